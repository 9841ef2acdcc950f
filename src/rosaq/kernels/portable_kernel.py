"""The Triton kernel of `portable.py`; imported only where Triton is.

M tokens, N outputs, K inputs; tensors as `layout.py` stores them. One program makes TILE_M x TILE_N outputs: first the quantized channels
in steps of STEP, then the salient ones. Arguments other than `tl.constexpr` carry no annotation: Triton would look its name up.
"""
# ruff: noqa: ANN001, ANN202
# mypy: disallow-untyped-defs=False

import triton
import triton.language as tl


@triton.jit
def _codes(words, bit, mask, BITS: tl.constexpr):
    """Codes of BITS bits that start at bit `bit` of rows of int32 words; they may cross into the next word."""
    shift = bit & 31
    code = tl.load(words + (bit >> 5), mask=mask, other=0).to(tl.uint32, bitcast=True) >> shift.to(tl.uint32)
    if 32 % BITS != 0:
        crosses = shift + BITS > 32
        rest = tl.load(words + (bit >> 5) + 1, mask=mask & crosses, other=0).to(tl.uint32, bitcast=True)
        code = code | tl.where(crosses, rest << ((32 - shift) & 31).to(tl.uint32), 0)
    return (code & ((1 << BITS) - 1)).to(tl.int32)


@triton.jit
def product(  # noqa: PLR0913
    x, y, qweight, scales, zeros, salient, salient_scales, bias, order,
    tokens, n, stride_m, stride_k, row_words,
    BITS: tl.constexpr, CODE_STEP: tl.constexpr, ZERO_BITS: tl.constexpr, GROUP: tl.constexpr, GROUPS: tl.constexpr, BLOCKS: tl.constexpr,
    BLOCK_SIZE: tl.constexpr, SALIENT: tl.constexpr, SALIENT_BYTES: tl.constexpr, BIAS: tl.constexpr, ORDERED: tl.constexpr, ONE_GROUP: tl.constexpr,
    TILE_M: tl.constexpr, TILE_N: tl.constexpr, STEP: tl.constexpr,
) -> None:  # fmt: skip
    """Write y (M, N) = x (M, K) W^T + b. GROUPS: per block; ONE_GROUP: no step crosses a group."""
    row = tl.program_id(0) * TILE_N + tl.arange(0, TILE_N)
    token = tl.program_id(1) * TILE_M + tl.arange(0, TILE_M)
    row_there, token_there = row < n, token < tokens
    row64, token64 = row.to(tl.int64), token.to(tl.int64)
    QUANTIZED: tl.constexpr = BLOCK_SIZE - SALIENT
    kind = y.dtype.element_ty
    total = tl.zeros((TILE_M, TILE_N), tl.float32)
    zero_word, zero_shift = (row * ZERO_BITS) >> 5, ((row * ZERO_BITS) & 31).to(tl.uint32)
    for first in range(0, BLOCKS * QUANTIZED, STEP):
        j = first + tl.arange(0, STEP)
        there = j < BLOCKS * QUANTIZED
        channel = (j // QUANTIZED) * BLOCK_SIZE + SALIENT + j % QUANTIZED
        if ORDERED:
            channel = tl.load(order + channel, mask=there, other=0)
        x_MK = tl.load(x + token64[:, None] * stride_m + channel[None, :] * stride_k, mask=token_there[:, None] & there[None, :], other=0.0)
        mask = there[:, None] & row_there[None, :]
        code_KN = _codes(qweight + row64[None, :] * row_words, (j * BITS)[:, None], mask, BITS)
        if ONE_GROUP:
            group = (first // QUANTIZED) * GROUPS + (first % QUANTIZED) // GROUP
            scale = tl.load(scales + row64 * (BLOCKS * GROUPS) + group, mask=row_there, other=0.0)[None, :]
            zero = tl.load(zeros + zero_word * (BLOCKS * GROUPS) + group, mask=row_there, other=0).to(tl.uint32, bitcast=True) >> zero_shift
            zero = (zero & ((1 << ZERO_BITS) - 1)).to(tl.int32)[None, :]
        else:
            group = ((j // QUANTIZED) * GROUPS + (j % QUANTIZED) // GROUP)[:, None]
            scale = tl.load(scales + row64[None, :] * (BLOCKS * GROUPS) + group, mask=mask, other=0.0)
            zero = tl.load(zeros + zero_word[None, :] * (BLOCKS * GROUPS) + group, mask=mask, other=0).to(tl.uint32, bitcast=True)
            zero = ((zero >> zero_shift[None, :]) & ((1 << ZERO_BITS) - 1)).to(tl.int32)
        weight_KN = ((code_KN * CODE_STEP - zero).to(tl.float32) * scale.to(tl.float32)).to(kind)
        total = tl.dot(x_MK.to(kind), weight_KN, total)
    for first in range(0, BLOCKS * SALIENT, STEP):
        j = first + tl.arange(0, STEP)
        there = j < BLOCKS * SALIENT
        channel = (j // SALIENT) * BLOCK_SIZE + j % SALIENT
        if ORDERED:
            channel = tl.load(order + channel, mask=there, other=0)
        x_MK = tl.load(x + token64[:, None] * stride_m + channel[None, :] * stride_k, mask=token_there[:, None] & there[None, :], other=0.0)
        weight = tl.load(salient + row64[None, :] * (BLOCKS * SALIENT) + j[:, None], mask=there[:, None] & row_there[None, :], other=0.0)
        if SALIENT_BYTES:
            weight = weight.to(tl.float32) * tl.load(salient_scales + row, mask=row_there, other=0.0)[None, :].to(tl.float32)
        total = tl.dot(x_MK.to(kind), weight.to(kind), total)
    if BIAS:
        total += tl.load(bias + row, mask=row_there, other=0.0)[None, :].to(tl.float32)
    tl.store(y + token64[:, None] * n + row[None, :], total.to(kind), mask=token_there[:, None] & row_there[None, :])
