"""Attention of a decoding step over a paged cache of keys and values, in Triton: one query token per sequence.

A program answers the queries of one key-value head over a piece of one sequence, and reads that piece's keys and values once, in tiles of
tokens that are on their way to shared memory while earlier ones are multiplied. Where there are fewer heads and sequences than the GPU has
room for, sequences are cut into several pieces, and the piece that ends last adds them up. With one query head per key-value head there is
nothing for a tensor core to share: every row of a tile keeps a softmax of its own, and the rows are added up at the end. With several, the
queries are rows of a matrix product. An FP8 cache is multiplied as it is; its scales go into the queries and into the result. Imported only
where Triton is.
"""
# ruff: noqa: ANN001
# mypy: disallow-untyped-defs=False

import math
from functools import cache

import torch
import triton
import triton.language as tl

LOWEST = tl.constexpr(-1e30)  # a score of a token that is not there: minus infinity without its NaN
# By whether heads are grouped, the cache has 8 bits and sequences are cut: tokens of a tile, tiles on their way, warps; the fastest on an H200.
FORMS = {
    (False, False, False): dict(TILE=16, STAGES=3, num_warps=2),
    (False, False, True): dict(TILE=8, STAGES=6, num_warps=1),
    (False, True, False): dict(TILE=16, STAGES=4, num_warps=2),
    (False, True, True): dict(TILE=16, STAGES=4, num_warps=2),
    (True, False, False): dict(TILE=64, STAGES=3, num_warps=2),
    (True, False, True): dict(TILE=64, STAGES=3, num_warps=2),
    (True, True, False): dict(TILE=64, STAGES=5, num_warps=2),
    (True, True, True): dict(TILE=64, STAGES=5, num_warps=2),
}
# By the first two: programs to run at once, eight or four on each of 132 processors; tokens of the shortest piece while they do not.
SLOTS = {(False, False): (1056, 64), (False, True): (528, 128), (True, False): (528, 64), (True, True): (528, 64)}
LONG = 512  # tokens of the shortest piece where it is full, and pieces only make its last round fuller
MOST = 32  # pieces of a sequence
PIECES = 2048  # in the workspace
ROOM = PIECES * 1024  # numbers of their sums there: eight query heads of 128 a piece


@triton.jit
def piece_of(n, parts, least, TILE: tl.constexpr, SPLIT: tl.constexpr):  # noqa: ANN201
    """Where this program's piece of n tokens begins and ends, and how many pieces there are."""
    if SPLIT:
        size = tl.maximum(tl.cdiv(tl.cdiv(n, parts), TILE) * TILE, least)
        begin = tl.program_id(2) * size
        return begin, tl.minimum(begin + size, n), tl.maximum(tl.cdiv(n, size), 1)
    return 0, n, 1


@triton.jit
def places(token, end, pages, head, page_stride, token_stride, head_stride, PAGE: tl.constexpr):  # noqa: ANN201, PLR0913
    """Which tokens of a tile there are, and where their keys and values begin."""
    there = token < end
    page = tl.load(pages + token // PAGE, mask=there, other=0).to(tl.int64)
    return there, page * page_stride + token % PAGE * token_stride + head * head_stride


@triton.jit
def ends_last(counters, pieces):  # noqa: ANN201
    """Whether all other pieces of this head and sequence are in the workspace; the counter is back at zero then."""
    tl.debug_barrier()  # this piece is, for all threads
    counter = counters + tl.program_id(1) * tl.num_programs(0) + tl.program_id(0)
    last = tl.atomic_add(counter, 1, sem="acq_rel") == pieces - 1
    if last:
        tl.store(counter, 0)
    return last


@triton.jit
def joined(sums, tops, weights, first, pieces, member, D: tl.constexpr, MEMBERS: tl.constexpr, MOST: tl.constexpr):  # noqa: ANN201, PLR0913
    """One query head's result from all its pieces, read at once and past the first-level cache, which may hold what was there before."""
    piece = tl.arange(0, MOST)
    there = piece < pieces
    slot = (first + piece) * MEMBERS + member
    top = tl.load(tops + slot, mask=there, other=LOWEST, cache_modifier=".cg")
    weight = tl.load(weights + slot, mask=there, other=0.0, cache_modifier=".cg")
    part = tl.load(sums + slot[:, None] * D + tl.arange(0, D)[None, :], mask=there[:, None], other=0.0, cache_modifier=".cg")
    share = tl.exp2(top - tl.max(top, 0))
    return tl.sum(part * share[:, None], 0) / tl.sum(weight * share, 0)


@triton.jit(do_not_specialize=["parts", "least"])
def attend_rows(  # noqa: PLR0913
    q, out, keys, values, table, lengths, factor, key_scale, value_scale, sums, tops, weights, counters, parts, least,
    q_stride, out_stride, table_stride, page_stride, token_stride, head_stride,
    D: tl.constexpr, PAGE: tl.constexpr, TILE: tl.constexpr, STAGES: tl.constexpr, MOST: tl.constexpr, SPLIT: tl.constexpr,
) -> None:  # fmt: skip
    """One query head per key-value head; the grid is (heads, sequences, parts)."""
    head, sequence = tl.program_id(0), tl.program_id(1).to(tl.int64)
    n = tl.load(lengths + sequence)
    begin, end, pieces = piece_of(n, parts, least, TILE, SPLIT)
    if (begin >= n) & (begin > 0):
        return
    d, row = tl.arange(0, D), tl.arange(0, TILE)
    query = tl.load(q + sequence * q_stride + head * D + d).to(tl.float32) * (factor * tl.load(key_scale))
    pages = table + sequence * table_stride
    top = tl.full([TILE], LOWEST, tl.float32)
    weight = tl.zeros([TILE], tl.float32)
    total = tl.zeros([TILE, D], tl.float32)
    for start in tl.range(begin, end, TILE, num_stages=STAGES):
        there, base = places(start + row, end, pages, head, page_stride, token_stride, head_stride, PAGE)
        at = base[:, None] + d[None, :]
        k = tl.load(keys + at, mask=there[:, None], other=0.0)
        v = tl.load(values + at, mask=there[:, None], other=0.0)
        score = tl.where(there, tl.sum(k.to(tl.float32) * query[None, :], 1), LOWEST)
        higher = tl.maximum(top, score)
        p = tl.where(there, tl.exp2(score - higher), 0.0)
        old = tl.exp2(top - higher)
        weight = weight * old + p
        total = total * old[:, None] + p[:, None] * v.to(tl.float32)
        top = higher
    highest = tl.max(top, 0)
    share = tl.exp2(top - highest)
    whole = tl.sum(weight * share, 0)
    result = tl.sum(total * share[:, None], 0)
    place = out + sequence * out_stride + head * D + d
    if pieces == 1:
        alone = result * tl.load(value_scale) / tl.where(whole > 0, whole, 1.0)
        tl.store(place, alone.to(out.dtype.element_ty))
    else:
        first = (sequence * tl.num_programs(0) + head) * parts
        slot = first + tl.program_id(2)
        tl.store(sums + slot * D + d, result)
        tl.store(tops + slot, highest)
        tl.store(weights + slot, whole)
        if ends_last(counters, pieces):
            every = joined(sums, tops, weights, first, pieces, 0, D, 1, MOST) * tl.load(value_scale)
            tl.store(place, every.to(out.dtype.element_ty))


@triton.jit(do_not_specialize=["parts", "least"])
def attend_group(  # noqa: PLR0913
    q, out, keys, values, table, lengths, factor, key_scale, value_scale, sums, tops, weights, counters, parts, least,
    q_stride, out_stride, table_stride, page_stride, token_stride, head_stride,
    D: tl.constexpr, PAGE: tl.constexpr, TILE: tl.constexpr, STAGES: tl.constexpr, MOST: tl.constexpr, SPLIT: tl.constexpr,
    MEMBERS: tl.constexpr, PADDED: tl.constexpr, HALF: tl.constexpr,
) -> None:  # fmt: skip
    """MEMBERS query heads per key-value head, PADDED to a tensor core's rows; HALF: products in float16, else in the queries' type."""
    head, sequence = tl.program_id(0), tl.program_id(1).to(tl.int64)
    n = tl.load(lengths + sequence)
    begin, end, pieces = piece_of(n, parts, least, TILE, SPLIT)
    if (begin >= n) & (begin > 0):
        return
    d, row, member = tl.arange(0, D), tl.arange(0, TILE), tl.arange(0, PADDED)
    at = ((head * MEMBERS + member) * D)[:, None] + d[None, :]
    asks = member < MEMBERS
    query = tl.load(q + sequence * q_stride + at, mask=asks[:, None], other=0.0)
    kind: tl.constexpr = tl.float16 if HALF else query.dtype
    query = (query.to(tl.float32) * (factor * tl.load(key_scale))).to(kind)
    pages = table + sequence * table_stride
    top = tl.full([PADDED], LOWEST, tl.float32)
    weight = tl.zeros([PADDED], tl.float32)
    total = tl.zeros([PADDED, D], tl.float32)
    for start in tl.range(begin, end, TILE, num_stages=STAGES):
        there, base = places(start + row, end, pages, head, page_stride, token_stride, head_stride, PAGE)
        k = tl.load(keys + base[None, :] + d[:, None], mask=there[None, :], other=0.0).to(kind)
        v = tl.load(values + base[:, None] + d[None, :], mask=there[:, None], other=0.0).to(kind)
        score = tl.where(there[None, :], tl.dot(query, k), LOWEST)
        higher = tl.maximum(top, tl.max(score, 1))
        p = tl.where(there[None, :], tl.exp2(score - higher[:, None]), 0.0)
        old = tl.exp2(top - higher)
        weight = weight * old + tl.sum(p, 1)
        total = tl.dot(p.to(kind), v, total * old[:, None])
        top = higher
    place = out + sequence * out_stride + at
    if pieces == 1:
        result = total * (tl.load(value_scale) / tl.where(weight > 0, weight, 1.0))[:, None]
        tl.store(place, result.to(out.dtype.element_ty), mask=asks[:, None])
    else:
        first = (sequence * tl.num_programs(0) + head) * parts
        slot = (first + tl.program_id(2)) * MEMBERS + member
        tl.store(sums + slot[:, None] * D + d[None, :], total, mask=asks[:, None])
        tl.store(tops + slot, top, mask=asks)
        tl.store(weights + slot, weight, mask=asks)
        if ends_last(counters, pieces):
            for one in tl.static_range(MEMBERS):
                every = joined(sums, tops, weights, first, pieces, one, D, MEMBERS, MOST) * tl.load(value_scale)
                tl.store(out + sequence * out_stride + (head * MEMBERS + one) * D + d, every.to(out.dtype.element_ty))


@cache
def workspace(device: torch.device) -> tuple[torch.Tensor, ...]:
    """Sums, highest scores, weights of pieces and counters of a device, which all launches there share: one at a time may run.

    To be called once before a CUDA graph is captured, so that the counters' zeros are not written by that graph alone.
    """
    numbers = [torch.empty(count, dtype=torch.float32, device=device) for count in (ROOM, 64 * PIECES, 64 * PIECES)]
    return *numbers, torch.zeros(PIECES, dtype=torch.int32, device=device)


def cut(programs: int, members: int, size: int, slots: int, least: int) -> tuple[int, int]:
    """How many pieces sequences are cut into at most, and of how many tokens at least.

    Args:
        programs: key-value heads times sequences.
        members: query heads of one of them.
        size: of a head.
        slots: programs that the GPU has room for.
        least: tokens of a piece where it has room for twice as many.
    """
    most = min(MOST, PIECES // programs, ROOM // (programs * members * size), 64 * PIECES // (programs * members))
    if 2 * programs <= slots:
        return max(1, min(most, slots // programs)), least
    # Rounds of programs, in lengths of a whole sequence: the last one may be nearly empty.
    return min(range(1, max(1, min(most, 4)) + 1), key=lambda parts: -(-programs * parts // slots) / parts), LONG


def attend(  # noqa: PLR0913  (what a step consists of)
    q: torch.Tensor, out: torch.Tensor, cache: torch.Tensor, table: torch.Tensor, lengths: torch.Tensor, scale: float,
    key_scale: torch.Tensor, value_scale: torch.Tensor,
) -> None:  # fmt: skip
    """Write softmax(scale q K^T) V over each sequence's own keys and values to `out`, in one launch that a CUDA graph can hold.

    Launches on one device share a workspace, so no two of them may run at the same time; and `workspace` has to be called before one is captured.

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
    eight = cache.dtype == torch.float8_e4m3fn  # becomes float16 in one instruction
    parts, least = cut(key_heads * sequences, members, size, *SLOTS[members > 1, eight])
    tensors = (q, out, keys, values, table, lengths, scale * math.log2(math.e), key_scale, value_scale, *workspace(q.device), parts, least)
    strides = (q.stride(0), out.stride(0), table.stride(0), cache.stride(0), cache.stride(2), cache.stride(3))
    form = dict(D=size, PAGE=cache.shape[2], MOST=MOST, SPLIT=parts > 1, **FORMS[members > 1, eight, parts > 1])
    grid = (key_heads, sequences, parts)
    if members == 1:
        attend_rows[grid](*tensors, *strides, **form)
    else:
        attend_group[grid](*tensors, *strides, MEMBERS=members, PADDED=max(16, triton.next_power_of_2(members)), HALF=eight, **form)
