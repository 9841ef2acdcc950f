"""Decoding steps over paged caches, what `rosaq.kernels.attention` should make of them in float64, and what it takes to run it without a GPU."""

import torch
from transformers import DynamicCache

FP8 = torch.float8_e4m3fn
# query heads, key-value heads, head size, type, type of the cache, tokens of a page, heads before tokens
CASES = {
    "float16": (4, 4, 128, torch.float16, torch.float16, 16, False),
    "fp8": (2, 2, 128, torch.float16, FP8, 16, False),
    "fp8, bfloat16, heads first": (2, 2, 64, torch.bfloat16, FP8, 32, True),
    "groups": (8, 2, 64, torch.float16, torch.float16, 16, True),
    "groups, fp8": (8, 2, 128, torch.bfloat16, FP8, 16, False),
    "groups of 7, fp8": (7, 1, 128, torch.float16, FP8, 64, False),
    "groups of 8": (8, 1, 128, torch.float16, torch.float16, 16, False),
    "groups, bfloat16": (8, 2, 128, torch.bfloat16, torch.bfloat16, 16, False),  # on a GPU only: Triton 3.6's interpreter computes something else
}
LENGTHS = (17, 1, 0, 50, 64)
LONG = (1, 2049, 0, 700, 129)  # cut into pieces, in so small a batch


def step(case, device, lengths=LENGTHS):
    """Arguments of `attend` but for `out`, and the float64 result (sequences, heads, head size)."""
    heads, key_heads, size, dtype, kind, page, heads_first = CASES[case]
    generator = torch.Generator().manual_seed(0)
    per_sequence = -(-max(lengths) // page)
    count = per_sequence * len(lengths) + 1
    table = 1 + torch.randperm(count - 1, generator=generator).view(len(lengths), per_sequence).int()
    shape = (count, 2, key_heads, page, size) if heads_first else (count, 2, page, key_heads, size)
    cache = torch.randn(shape, generator=generator).to(kind)
    cache[0] = float("nan")  # a page of nobody
    cache = cache.transpose(2, 3) if heads_first else cache
    wide = (2 * torch.randn(len(lengths), 2, heads, size, generator=generator)).to(dtype)
    scale, (key_scale, value_scale) = 0.7 * size**-0.5, torch.tensor([0.5, 3.0] if kind == FP8 else [1.0, 1.0])
    moved = cache.transpose(2, 3).to(device).transpose(2, 3) if heads_first else cache.to(device)
    tensors = [x.to(device) for x in (table, torch.tensor(lengths, dtype=torch.int32))]
    arguments = (wide.to(device)[:, 0], moved, *tensors, scale, key_scale.to(device), value_scale.to(device))
    return arguments, in_float64(arguments)


def in_float64(arguments):
    """What `attend` should make of its arguments, on the CPU."""
    q, cache, table, lengths, scale, key_scale, value_scale = (x.cpu() if isinstance(x, torch.Tensor) else x for x in arguments)
    expected = torch.zeros(q.shape, dtype=torch.float64)
    for sequence, n in enumerate(lengths.tolist()):
        if n:
            own = cache[table[sequence].long()].double().transpose(0, 1).flatten(1, 2)[:, :n]  # keys and values, tokens, heads, size
            k, v = own.repeat_interleave(q.shape[1] // cache.shape[3], 2).transpose(1, 2)
            weights = torch.softmax(scale * key_scale.double() * (k @ q[sequence].double()[:, :, None])[..., 0], -1)
            expected[sequence] = value_scale.double() * (weights[:, None] @ v)[:, 0]
    return expected


def check(case, out, expected):
    """Equal to half a unit in the last place of the output's type, and the rounding of a group's weights to it."""
    error = (out.double().cpu() - expected).norm() / expected.norm()
    assert error < (2e-3 if out.dtype == torch.float16 else 1.2e-2), (case, float(error))
    empty = (expected == 0).flatten(1).all(1)
    assert not out.cpu()[empty].any()
    for sequence in (~empty).nonzero()[:, 0]:  # the norm of all would hide one that lacks a piece
        error = (out[sequence].double().cpu() - expected[sequence]).norm() / expected[sequence].norm()
        assert error < (4e-3 if out.dtype == torch.float16 else 2.4e-2), (case, int(sequence), float(error))


def spoil(sums, tops, weights, counters):
    """Let what an earlier launch left in the workspace be NaN; counters are to be zero."""
    assert not counters.any()
    for left in (sums, tops, weights):
        left.fill_(float("nan"))


def interpret():
    """Let Triton's interpreter run the kernels: numpy 2.4 makes no int of an array of one element, which the bound of a loop is there."""
    import triton.runtime.interpreter as interpreter

    patch = interpreter._patch_lang_tensor

    def patched(tensor, scope):
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    interpreter._patch_lang_tensor = patched


class EightBits(DynamicCache):
    """Keys and values of transformers' models rounded to 8 bits, as vLLM's FP8 cache without scales stores them."""

    def update(self, key_states, value_states, *args, **kwargs):
        rounded = (states.clamp(-448, 448).to(FP8).to(states.dtype) for states in (key_states, value_states))
        return super().update(*rounded, *args, **kwargs)
