"""The Triton kernel of `columns.py`; imported only where Triton is.

Arguments other than `tl.constexpr` carry no annotation: Triton would look its name up.
"""
# ruff: noqa: ANN001
# mypy: disallow-untyped-defs=False

import triton
import triton.language as tl


@triton.jit
def round_tile(  # noqa: PLR0913
    weight, factor, scale, zero, codes, errors, n, scale_stride, zero_stride, top, CHANNELS: tl.constexpr, PADDED: tl.constexpr, TILE_N: tl.constexpr
) -> None:  # fmt: skip
    """Round TILE_N outputs of weight (C, N) with factor (C, C); codes and errors (C, N). PADDED: the power of two from C on."""
    output = tl.program_id(0) * TILE_N + tl.arange(0, TILE_N)
    channel = tl.arange(0, PADDED)
    there = output < n
    mask = (channel < CHANNELS)[:, None] & there[None, :]
    tile = tl.load(weight + channel[:, None] * n + output[None, :], mask=mask, other=0.0)
    for c in range(CHANNELS):
        exact = tl.sum(tl.where(channel[:, None] == c, tile, 0.0), 0)
        grid = tl.load(scale + c * scale_stride + output, mask=there, other=1.0)
        middle = tl.load(zero + c * zero_stride + output, mask=there, other=0.0)
        inside = tl.minimum(tl.maximum(tl.div_rn(exact, grid) + middle, 0.0), top)
        code = (inside + 8388608.0) - 8388608.0  # at 2^23 a float32 has no fraction left: rounds to nearest, ties to even
        row = factor + c * CHANNELS
        error = tl.div_rn(exact - (code - middle) * grid, tl.load(row + c))
        follow = tl.load(row + channel, mask=(channel > c) & (channel < CHANNELS), other=0.0)
        tile -= follow[:, None] * error[None, :]
        tl.store(codes + c * n + output, code, mask=there)
        tl.store(errors + c * n + output, error, mask=there)
