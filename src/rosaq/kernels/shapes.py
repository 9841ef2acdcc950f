"""How a launch of the CUDA kernels is cut up: every way that fits, an estimate of its time, and the choice of the shortest.

The estimates were fitted to launches measured on an H200 (docs/log.md); they only have to put the ways in the right order.
"""

import ctypes
from dataclasses import dataclass
from functools import lru_cache
from itertools import product
from math import ceil
from typing import Any, ClassVar

from rosaq.kernels.measured import CUTS, MEASURED_TOKENS, MULTIPROCESSORS
from rosaq.kernels.stream import RUN, TILE, Form

DECODE_TOKENS = 16  # most that the decoding kernel takes
SHARED_BYTES = 226 * 1024  # that one CTA can have on sm_90, 1024 bytes left for what the compiler adds

BY_THREADS, PACKED, WHOLE = 0, 1, 2  # how the decoding kernel fetches x, see csrc/decode.cuh
MOST_BARRIERS = 64  # of a CTA, for pieces of x
TILES, DEPTH = {1: 1, 2: 2, 3: 2}, {1: 4, 2: 2, 3: 3}  # row tiles of a warp of the decoding kernel, and items fetched ahead, by variant


class DecodeShape(ctypes.Structure):
    """`DecodeShape` of csrc/decode.cuh."""

    _fields_: ClassVar[list[tuple[str, Any]]] = [
        (name, ctypes.c_int32) for name in ("tokens", "row_warps", "k_warps", "splits", "sharing", "chunks", "way", "pitch", "x_bytes")
    ]
    _fields_ += [("q_reciprocal", ctypes.c_uint32), ("s_reciprocal", ctypes.c_uint32), ("begin", ctypes.c_uint16 * 200)]


class BatchShape(ctypes.Structure):
    """`BatchShape` of csrc/batch.cuh."""

    _fields_: ClassVar[list[tuple[str, Any]]] = [
        (name, ctypes.c_int32) for name in ("tokens", "warp_groups", "splits", "slots", "slot_bytes", "row_tiles", "wide")
    ]
    _fields_ += [("begin", ctypes.c_uint16 * 10)]


@dataclass(frozen=True)
class Shape:
    """How a launch is cut up, with what is left of its arguments."""

    sizes: DecodeShape | BatchShape
    variant: int  # decoding: of `TILES` and `DEPTH`; batch: tokens per CTA

    @property
    def cut(self) -> tuple[int, ...]:
        """What tells it from the other ways to cut the same launch, as in `measured.CUTS`."""
        sizes = self.sizes
        if isinstance(sizes, DecodeShape):
            return sizes.splits, self.variant, sizes.row_warps, sizes.k_warps, sizes.sharing, sizes.chunks
        return sizes.splits, sizes.row_tiles, sizes.warp_groups, sizes.slots

    def __repr__(self) -> str:
        """Fields by name."""
        sizes = ", ".join(f"{name}={getattr(self.sizes, name)}" for name, kind in type(self.sizes)._fields_ if kind is ctypes.c_int32)
        return f"{type(self.sizes).__name__}({sizes}, variant={self.variant})"


@lru_cache(maxsize=4096)
def choose(form: Form, tokens: int, multiprocessors: int) -> Shape:
    """The launch that was fastest where this layer was measured, otherwise the one with the least estimated time among those that fit."""
    candidates = decode_shapes(form, tokens) if tokens <= DECODE_TOKENS else batch_shapes(form, tokens)
    measured = measured_cut(form, tokens)
    if multiprocessors == MULTIPROCESSORS and measured:
        found = next((shape for shape in candidates if shape.cut == measured), None)
        if found:
            return found
    cost = _decode_cost if tokens <= DECODE_TOKENS else _batch_cost
    return min(candidates, key=lambda shape: cost(form, shape, multiprocessors))


def measured_cut(form: Form, tokens: int) -> tuple[int, ...] | None:
    """The cut that was fastest for this layer, or the nearest of its bits, tiles and channels: other salient channels, then other groups."""
    size = next((size for size in MEASURED_TOKENS if tokens <= size), 0)
    channels = form.q_items * form.runs + form.s_items
    found: dict[tuple[bool, bool], tuple[int, ...]] = {}
    for (bits, group_runs, tiles, q_items, s_items, measured_tokens), cut in CUTS.items():
        runs = 6 if group_runs == 3 else 4
        if (bits, tiles, measured_tokens, runs, q_items * runs + s_items) == (form.bits, form.tiles, size, form.runs, channels):
            found.setdefault((group_runs != form.group_runs, (q_items, s_items) != (form.q_items, form.s_items)), cut)
    return found[min(found)] if found else None


def decode_shapes(form: Form, tokens: int) -> list[Shape]:
    """Every way to cut a launch of the decoding kernel that fits into shared memory."""
    found: dict[tuple[int, ...], Shape] = {}
    weights = (form.code_bytes + form.scale_bytes, form.s_item_bytes)
    slot_bytes = max(1024, weights[0])
    reciprocals = [-(-(1 << 32) // n) % (1 << 32) for n in (form.q_runs_per_block, form.s_runs_per_block)]
    for splits, variant, row_warps, warps in product((1, 2, 3, 4, 6, 8), (1, 2, 3), range(1, 17), (4, 6, 8, 10, 12, 14, 16, 18, 20, 24)):
        k_warps = min(warps // row_warps, (form.q_items + form.s_items) // splits)
        most = 24 if variant == 1 else 20 if tokens <= 8 else 16  # as the kernels are built
        if k_warps < 1 or warps > most or (splits, variant, row_warps, k_warps, 1, 1) in found or k_warps > MOST_BARRIERS:
            continue
        begin = _shares(form, weights, splits * k_warps)
        way = form.way if splits == 1 or form.way < WHOLE else BY_THREADS
        stretches = (_x_place(form, begin[i + k_warps]) - _x_place(form, begin[i]) for i in range(0, splits * k_warps, k_warps))
        row = form.columns * 2 if way == WHOLE else max(stretches)
        pitch = row + 16  # an odd number of 16 bytes, so that ldmatrix has no conflicts
        x_bytes = -(-tokens * pitch // 128) * 128
        if x_bytes + row_warps * k_warps * TILES[variant] * DEPTH[variant] * slot_bytes > SHARED_BYTES:
            continue
        for sharing, chunks in product((1, 2, 4) if way and tokens > 8 else (1,), (1, 2, 4)):
            if sharing * splits > 8 or k_warps * chunks > MOST_BARRIERS:
                continue
            cut = (tokens, row_warps, k_warps, splits, sharing, chunks, way, pitch, x_bytes)
            sizes = DecodeShape(*cut, *reciprocals, (ctypes.c_uint16 * 200)(*begin))
            found[splits, variant, row_warps, k_warps, sharing, chunks] = Shape(sizes, variant)
    if not found:
        raise ValueError(f"the decoding kernel has no room for {tokens} tokens of {form.columns} channels in shared memory")
    return list(found.values())


def _runs(form: Form, item: int) -> int:
    """Runs of x before an item."""
    return min(item, form.q_items) * form.runs + max(0, item - form.q_items)


def _x_place(form: Form, item: int) -> int:
    """Where an item starts in a token's row of x in shared memory, in bytes."""
    return min(item, form.q_items) * (512 if form.runs == 6 else 64 * form.runs) + max(0, item - form.q_items) * 2 * RUN


def _shares(form: Form, weights: tuple[int, int], parts: int) -> list[int]:
    """First item of each of `parts` shares, and the end, where a quantized and a salient item cost as much as `weights` say."""
    quantized = form.q_items * weights[0]
    total = quantized + form.s_items * weights[1]
    begin = []
    for part in range(parts + 1):
        at = total * part // parts
        begin.append((at + weights[0] // 2) // weights[0] if at <= quantized else form.q_items + (at - quantized + weights[1] // 2) // weights[1])
    return begin


def _decode_cost(form: Form, shape: Shape, multiprocessors: int) -> float:
    """Estimated microseconds. The constants were fitted to 1605 launches measured on an H200 (docs/log.md)."""
    sizes = shape.sizes
    assert isinstance(sizes, DecodeShape)
    two_token_tiles, per_warp, cluster = sizes.tokens > 8, TILES[shape.variant], sizes.splits * sizes.sharing
    tiles, warps = sizes.row_warps * per_warp, sizes.row_warps * sizes.k_warps
    ctas = -(-form.tiles // (tiles * sizes.sharing)) * cluster
    slot_bytes = max(1024, form.code_bytes + form.scale_bytes)
    shared = sizes.x_bytes + warps * per_warp * DEPTH[shape.variant] * slot_bytes + 2048
    registers = {(False, 1): 56, (False, 2): 72, (True, 1): 72, (True, 2): 96}[two_token_tiles, per_warp]
    resident = max(1, min((227 << 10) // shared, 65536 // (registers * (warps + 4) * 32), 64 // (warps + 4)))
    usable = multiprocessors if cluster <= 2 else 0.89 * multiprocessors
    each, most = ctas / usable, ceil(ctas / usable)
    load = tiles * form.tile_bytes / sizes.splits * (0.322 * most + 0.678 * max(each, 1))  # bytes of a multiprocessor
    slower = 1.88 if two_token_tiles else 1.0
    compute = load / per_warp / (min(max(each, 1), resident) * warps) * 119e-6 * slower + load * 4.69e-6 * slower**0.5
    memory = form.tiles * form.tile_bytes / 2.93e6
    time = 1 + max(compute, memory) + 2.11 * min(compute, memory) + ctas * sizes.x_bytes / 4.02e6 / sizes.sharing**0.524
    time += 0.375 * sizes.k_warps * sizes.chunks + 0.163 * (sizes.sharing - 1) + 13.0 * (ceil(ctas / (usable * resident)) - 1)
    return time + (2.26 + 0.973 * sizes.splits if sizes.splits > 1 else 0)


def batch_shapes(form: Form, tokens: int) -> list[Shape]:
    """Every way to cut a launch of the batch kernel that fits into shared memory."""
    found: dict[tuple[int, ...], Shape] = {}
    tile = next((t for t in (32, 64) if tokens <= t), 128)
    weights = (form.code_bytes + form.scale_bytes + form.runs * tile * 5, form.s_item_bytes + tile * 5)  # bytes to read, channels to multiply
    for groups, twice, splits, resident in product((1, 2, 3, 4), (1, 2), (1, 2, 3, 4, 6, 8), (1, 2)):
        row_tiles = 4 * groups * twice
        stage = form.runs * tile * 64 + row_tiles * (form.code_bytes + form.scale_bytes)
        salient = 2 * (tile * 64 + row_tiles * form.s_item_bytes) if form.s_items else 0
        slot_bytes = -(-max(stage, salient) // 1024) * 1024
        slots = min(8, (SHARED_BYTES // resident - 1024) // (slot_bytes + 16))
        sums = tile * (TILE * row_tiles + 4) * 4
        if slots < 2 or sums > slots * slot_bytes or splits > (form.q_items + form.s_items) // 2 or tile * twice > 128:
            continue  # 128 tokens and twice 64 rows would not fit into registers
        begin = [item - max(0, item - form.q_items) % 2 for item in _shares(form, weights, splits)]
        sizes = BatchShape(tokens, groups, splits, slots, slot_bytes, row_tiles, 0, (ctypes.c_uint16 * 10)(*begin))
        found[groups, twice, splits, slots] = Shape(sizes, tile)
    return list(found.values())


def _batch_cost(form: Form, shape: Shape, multiprocessors: int) -> float:
    """Estimated microseconds, fitted to 260 launches measured on an H200 (docs/log.md). Clusters of 3 and more leave multiprocessors idle."""
    sizes = shape.sizes
    assert isinstance(sizes, BatchShape)
    tiles, tokens = sizes.row_tiles, shape.variant
    token_tiles = -(-sizes.tokens // tokens)
    ctas = -(-form.tiles // tiles) * sizes.splits * token_tiles
    waves = -(-ctas // (multiprocessors if sizes.splits <= 2 else multiprocessors * 3 // 4))
    stages = form.q_items * form.runs / 4 + form.s_items * 0.3  # in blocks of 128 channels
    per_stage = 0.19 + tiles * (0.0133 + 0.00043 * tokens) + (0.0019 * tokens if tiles > 4 * sizes.warp_groups else 0)
    x_bytes = _runs(form, form.q_items + form.s_items) * RUN / sizes.splits * tokens * 2
    from_l2 = (ctas * x_bytes + form.tiles * form.tile_bytes * token_tiles) / 27.5e6
    return 2.6 + waves * stages / sizes.splits * per_stage + from_l2 + (0.67 + 0.0007 * tokens + 0.79 * sizes.splits if sizes.splits > 1 else 0)
