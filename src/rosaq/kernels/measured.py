"""The fastest ways to cut a launch, measured on an H200: the fused layers of Llama-2-7B and Llama-3-8B, group 128 (docs/log.md).

A layer is (bits, runs per scale, row tiles, quantized blocks, salient runs). A cut is, up to 16 tokens, (CTAs per cluster, row tiles per warp,
warps over rows, warps over channels), and above (CTAs per cluster, row tiles per CTA, warp groups, stages in shared memory). For the 1792 row
tiles in 4 bits at 64 and 128 tokens it is the cut that was timed in 3 bits.
"""

MULTIPROCESSORS = 132  # of an H200
MEASURED_TOKENS = (1, 8, 16, 32, 64, 128)  # a cut serves the numbers of tokens up to its own that the one before does not

_MEASURED: dict[tuple[int, int, int, int, int], dict[int, tuple[int, ...]]] = {
    (4, 3, 256, 16, 32): {1: (1, 1, 2, 8), 8: (1, 1, 2, 4), 16: (1, 2, 1, 8), 64: (3, 4, 1, 3), 128: (2, 4, 1, 4)},
    (4, 4, 256, 86, 0): {1: (1, 2, 1, 16), 8: (3, 2, 4, 4), 16: (2, 2, 2, 6), 64: (3, 8, 2, 8), 128: (3, 8, 2, 5)},
    (4, 4, 256, 112, 0): {1: (1, 2, 1, 16), 16: (8, 2, 5, 2), 64: (3, 8, 2, 8), 128: (3, 8, 2, 5)},
    (4, 4, 384, 31, 4): {1: (1, 2, 1, 8), 16: (1, 2, 2, 6), 64: (3, 12, 3, 3), 128: (2, 8, 2, 5)},
    (4, 4, 768, 31, 4): {1: (1, 1, 3, 4), 8: (1, 1, 6, 2), 16: (1, 2, 3, 4), 64: (2, 12, 3, 3), 128: (2, 12, 3, 4)},
    (4, 4, 1376, 31, 4): {1: (1, 1, 6, 2), 8: (1, 1, 11, 2), 16: (1, 2, 6, 2), 64: (1, 12, 3, 7), 128: (1, 12, 3, 4)},
    (4, 4, 1792, 31, 4): {1: (1, 1, 7, 2), 16: (1, 2, 8, 2), 64: (1, 16, 4, 5), 128: (1, 16, 4, 4)},
    (3, 3, 256, 16, 32): {1: (1, 1, 2, 8), 16: (1, 2, 1, 12), 64: (3, 4, 1, 3), 128: (2, 4, 1, 4)},
    (3, 4, 256, 86, 0): {1: (1, 2, 1, 16), 16: (2, 2, 2, 6), 64: (3, 8, 2, 8), 128: (3, 8, 2, 5)},
    (3, 4, 256, 112, 0): {1: (1, 2, 1, 16), 16: (3, 2, 4, 3)},
    (3, 4, 384, 31, 4): {1: (1, 2, 2, 8), 16: (1, 2, 2, 6)},
    (3, 4, 768, 31, 4): {1: (1, 2, 3, 5), 16: (1, 2, 3, 5), 64: (2, 12, 3, 3), 128: (2, 12, 3, 5)},
    (3, 4, 1376, 31, 4): {1: (1, 1, 12, 2), 16: (1, 2, 6, 2), 64: (1, 12, 3, 7), 128: (1, 12, 3, 5)},
    (3, 4, 1792, 31, 4): {1: (1, 2, 8, 2), 16: (1, 2, 8, 2), 64: (1, 16, 4, 5), 128: (1, 16, 4, 4)},
}
CUTS = {(*layer, tokens): cut for layer, cuts in _MEASURED.items() for tokens, cut in cuts.items()}
