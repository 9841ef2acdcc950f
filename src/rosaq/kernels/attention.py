"""Attention of a decoding step over a paged cache of keys and values, in Triton: one query token per sequence.

One program answers the queries of one key-value head of one sequence, and reads that head's keys and values once, in tiles of tokens that
are on their way to shared memory while earlier ones are multiplied. With one query head per key-value head there is nothing for a tensor
core to share: every row of a tile keeps a softmax of its own, and the rows are added up at the end. With several, the queries are rows of
a matrix product. An FP8 cache is multiplied as it is; its scales go into the queries and into the result. Imported only where Triton is.
"""
# ruff: noqa: ANN001
# mypy: disallow-untyped-defs=False

import math

import torch
import triton
import triton.language as tl

LOWEST = tl.constexpr(-1e30)  # a score of a token that is not there: minus infinity without its NaN
# Tokens of a tile, tiles on their way, warps: the fastest of those measured on an H200 (docs/log.md).
ROWS = dict(TILE=16, STAGES=4, num_warps=2)
GROUP = dict(TILE=32, STAGES=3, num_warps=2)


@triton.jit
def places(token, n, pages, head, page_stride, token_stride, head_stride, PAGE: tl.constexpr):  # noqa: ANN201, PLR0913
    """Which tokens of a tile there are, and where their keys and values begin."""
    there = token < n
    page = tl.load(pages + token // PAGE, mask=there, other=0).to(tl.int64)
    return there, page * page_stride + token % PAGE * token_stride + head * head_stride


@triton.jit
def attend_rows(  # noqa: PLR0913
    q, out, keys, values, table, lengths, factor, key_scale, value_scale,
    q_stride, out_stride, table_stride, page_stride, token_stride, head_stride,
    D: tl.constexpr, PAGE: tl.constexpr, TILE: tl.constexpr, STAGES: tl.constexpr,
) -> None:  # fmt: skip
    """One query head per key-value head; the grid is (heads, sequences)."""
    head, sequence = tl.program_id(0), tl.program_id(1).to(tl.int64)
    n = tl.load(lengths + sequence)
    d, row = tl.arange(0, D), tl.arange(0, TILE)
    query = tl.load(q + sequence * q_stride + head * D + d).to(tl.float32) * (factor * tl.load(key_scale))
    pages = table + sequence * table_stride
    top = tl.full([TILE], LOWEST, tl.float32)
    weight = tl.zeros([TILE], tl.float32)
    total = tl.zeros([TILE, D], tl.float32)
    for start in tl.range(0, n, TILE, num_stages=STAGES):
        there, base = places(start + row, n, pages, head, page_stride, token_stride, head_stride, PAGE)
        place = base[:, None] + d[None, :]
        k = tl.load(keys + place, mask=there[:, None], other=0.0)
        v = tl.load(values + place, mask=there[:, None], other=0.0)
        score = tl.where(there, tl.sum(k.to(tl.float32) * query[None, :], 1), LOWEST)
        higher = tl.maximum(top, score)
        p = tl.where(there, tl.exp2(score - higher), 0.0)
        old = tl.exp2(top - higher)
        weight = weight * old + p
        total = total * old[:, None] + p[:, None] * v.to(tl.float32)
        top = higher
    share = tl.exp2(top - tl.max(top, 0))
    whole = tl.sum(weight * share, 0)
    result = tl.sum(total * share[:, None], 0) * tl.load(value_scale) / tl.where(whole > 0, whole, 1.0)
    tl.store(out + sequence * out_stride + head * D + d, result.to(out.dtype.element_ty))


@triton.jit
def attend_group(  # noqa: PLR0913
    q, out, keys, values, table, lengths, factor, key_scale, value_scale,
    q_stride, out_stride, table_stride, page_stride, token_stride, head_stride,
    D: tl.constexpr, PAGE: tl.constexpr, TILE: tl.constexpr, STAGES: tl.constexpr, MEMBERS: tl.constexpr, PADDED: tl.constexpr, HALF: tl.constexpr,
) -> None:  # fmt: skip
    """MEMBERS query heads per key-value head, PADDED to a tensor core's rows; HALF: products in float16, else in the queries' type."""
    head, sequence = tl.program_id(0), tl.program_id(1).to(tl.int64)
    n = tl.load(lengths + sequence)
    d, row, member = tl.arange(0, D), tl.arange(0, TILE), tl.arange(0, PADDED)
    at = ((head * MEMBERS + member) * D)[:, None] + d[None, :]
    asks = (member < MEMBERS)[:, None]
    query = tl.load(q + sequence * q_stride + at, mask=asks, other=0.0)
    kind: tl.constexpr = tl.float16 if HALF else query.dtype
    query = (query.to(tl.float32) * (factor * tl.load(key_scale))).to(kind)
    pages = table + sequence * table_stride
    top = tl.full([PADDED], LOWEST, tl.float32)
    weight = tl.zeros([PADDED], tl.float32)
    total = tl.zeros([PADDED, D], tl.float32)
    for start in tl.range(0, n, TILE, num_stages=STAGES):
        there, base = places(start + row, n, pages, head, page_stride, token_stride, head_stride, PAGE)
        k = tl.load(keys + base[None, :] + d[:, None], mask=there[None, :], other=0.0).to(kind)
        v = tl.load(values + base[:, None] + d[None, :], mask=there[:, None], other=0.0).to(kind)
        score = tl.where(there[None, :], tl.dot(query, k), LOWEST)
        higher = tl.maximum(top, tl.max(score, 1))
        p = tl.where(there[None, :], tl.exp2(score - higher[:, None]), 0.0)
        old = tl.exp2(top - higher)
        weight = weight * old + tl.sum(p, 1)
        total = tl.dot(p.to(kind), v, total * old[:, None])
        top = higher
    result = total * (tl.load(value_scale) / tl.where(weight > 0, weight, 1.0))[:, None]
    tl.store(out + sequence * out_stride + at, result.to(out.dtype.element_ty), mask=asks)


def attend(  # noqa: PLR0913  (what a step consists of)
    q: torch.Tensor, out: torch.Tensor, cache: torch.Tensor, table: torch.Tensor, lengths: torch.Tensor, scale: float,
    key_scale: torch.Tensor, value_scale: torch.Tensor,
) -> None:  # fmt: skip
    """Write softmax(scale q K^T) V over each sequence's own keys and values to `out`, in one launch that a CUDA graph can hold.

    Args:
        q: (sequences, heads, head size) of float16 or bfloat16, the heads of a sequence one after the other; the head size a power of two.
        out: as q; a sequence of no tokens gets zeros.
        cache: (pages, 2, tokens of a page, key-value heads, head size), keys and values in q's type or float8_e4m3fn; strides may have any
            order, but the last is 1.
        table: (sequences, pages) int32: which pages hold a sequence.
        lengths: (sequences,) int32: how many tokens it has.
        scale: of the scores.
        key_scale: one float32 on the device, which cached keys are multiplied by.
        value_scale: the same of values.
    """
    sequences, heads, size = q.shape
    key_heads, members = cache.shape[3], heads // cache.shape[3]
    keys, values = cache.unbind(1)
    tensors = (q, out, keys, values, table, lengths, scale * math.log2(math.e), key_scale, value_scale)
    strides = (q.stride(0), out.stride(0), table.stride(0), cache.stride(0), cache.stride(2), cache.stride(3))
    grid = (key_heads, sequences)
    if members == 1:
        attend_rows[grid](*tensors, *strides, D=size, PAGE=cache.shape[2], **ROWS)
        return
    padded, half = max(16, triton.next_power_of_2(members)), cache.dtype == torch.float8_e4m3fn  # which becomes float16 in one instruction
    attend_group[grid](*tensors, *strides, D=size, PAGE=cache.shape[2], MEMBERS=members, PADDED=padded, HALF=half, **GROUP)
