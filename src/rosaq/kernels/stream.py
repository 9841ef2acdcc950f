"""The repacked weight of the CUDA kernels: the checkpoint's tensors as one stream of pieces of 16 outputs.

`csrc/format.cuh` says what the bytes mean; this file writes them, with tensor operations alone, on any device.

N outputs (padded to a multiple of 16), T row tiles of 16, R runs of 32 channels, U units of 64 channels, J gathered channels.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from math import gcd

import torch

from rosaq.layout import LinearLayout
from rosaq.packing import unpack, unpack_zeros

TILE, RUN = 16, 32
THREE_BIT_PAIRS = ((0, 1, 2, 3, 4), (6, 5, 8, 7, 10), (12, 9, 14, 11, 13))  # of a unit, in its three words
SLACK_BYTES = 4096  # after the last part; no piece is longer
CHUNK_BYTES = 1 << 28  # of intermediate codes: rows are repacked in pieces, so that a large layer needs little scratch memory


@dataclass(frozen=True)
class Form:
    """Sizes of a repacked layer, and where its runs lie in a row of x. Mirrors `Weights` of csrc/format.cuh."""

    bits: int
    group_runs: int  # runs that share a scale: 1 to 4
    out_features: int
    tiles: int
    q_items: int
    s_items: int
    s_item_bytes: int
    blocks: int
    block_size: int
    q_runs_per_block: int
    q_valid: int
    q_offset: int
    s_runs_per_block: int
    s_valid: int
    s_offset: int

    @property
    def units(self) -> int:
        """Units of 64 channels per block of codes."""
        return 3 if self.group_runs == 3 else 2

    @property
    def runs(self) -> int:
        """Runs per block of codes; a salient item is one run."""
        return 2 * self.units

    @property
    def code_bytes(self) -> int:
        """Bytes of a block of codes."""
        return self.units * self.bits * 128

    @property
    def scale_bytes(self) -> int:
        """Bytes of the scales and offsets of a block."""
        return self.runs // self.group_runs * 64

    @property
    def scales_offset(self) -> int:
        """Where the scales start."""
        return self.q_items * self.tiles * self.code_bytes

    @property
    def salient_offset(self) -> int:
        """Where the salient runs start."""
        return self.scales_offset + -(-self.q_items * self.tiles * self.scale_bytes // 128) * 128

    @property
    def tile_bytes(self) -> int:
        """Bytes of one row tile, in all parts of the stream."""
        return self.q_items * (self.code_bytes + self.scale_bytes) + self.s_items * self.s_item_bytes

    @property
    def stream_bytes(self) -> int:
        """Bytes of the stream; a warp with two row tiles may read one tile past the last."""
        return self.salient_offset + self.s_items * self.tiles * self.s_item_bytes + SLACK_BYTES

    @property
    def way(self) -> int:
        """How the decoding kernel can fetch x (csrc/activations.cuh): 1 in two stretches, 2 as it lies (blocks of 32 + 96 channels), 0 by threads."""
        whole_runs = self.q_valid % RUN == 0 and (self.s_items == 0 or self.s_valid == self.s_runs_per_block * RUN)
        salient_runs = self.s_runs_per_block * self.blocks if self.s_items else 0
        no_padding = (self.q_runs_per_block * self.blocks, salient_runs) == (self.q_items * self.runs, self.s_items)
        if not whole_runs or not no_padding:
            return 0
        if self.blocks == 1:
            return 1 if self.runs == 4 else 0
        pairs = (3, self.blocks, 128, 0, RUN)
        return 2 if self.runs == 6 and (self.q_runs_per_block, self.s_items, self.block_size, self.s_offset, self.q_offset) == pairs else 0

    @property
    def columns(self) -> int:
        """Channels of a row of x as the kernel reads it."""
        return self.blocks * self.block_size


@dataclass(frozen=True)
class _Runs:
    """Which stored column every channel of the stream holds (-1: none), and the group of every run (-1: none)."""

    quantized: torch.Tensor  # (R_q 32,)
    groups: torch.Tensor  # (R_q,)
    salient: torch.Tensor  # (R_s 32,)


@lru_cache(maxsize=256)
def plan(layout: LinearLayout) -> tuple[Form, torch.Tensor | None, _Runs]:
    """The form of a layer, and the gather of x that it needs (positions in x; K reads a zero), or None."""
    q_columns, groups, counts = _quantized_runs(layout)
    share = gcd(*counts)
    group_runs = next(n for n in (4, 3, 2, 1) if share % n == 0)
    item_runs = 6 if group_runs == 3 else 4
    q_items = -(-len(groups) // item_runs)
    short = q_items * item_runs - len(groups)
    pad = torch.nn.functional.pad
    direct = (
        not layout.ordered
        and layout.block_size % 8 == 0
        and layout.salient % 8 == 0
        and (layout.group_size % RUN == 0 or layout.groups_per_block == 1)
    )
    s_per_block = -(-layout.salient // RUN) if direct else -(-layout.blocks * layout.salient // RUN)
    s_blocks, s_channels = (layout.blocks, layout.salient) if direct else (1, layout.blocks * layout.salient)
    salient = pad(torch.arange(s_blocks * s_channels).view(s_blocks, s_channels), (0, s_per_block * RUN - s_channels), value=-1).flatten()
    gather = None
    if not direct:
        positions = layout.quantized_columns(), layout.salient_columns()
        if layout.ordered:
            raise AssertionError("the caller composes `order` with the gather")
        nothing = torch.tensor([layout.in_features])
        gather = torch.cat([torch.cat((p, nothing))[c] for p, c in zip(positions, (q_columns, salient), strict=True)])
    form = Form(
        bits=layout.bits,
        group_runs=group_runs,
        out_features=layout.out_features,
        tiles=-(-layout.out_features // TILE),
        q_items=q_items,
        s_items=-(-len(salient) // RUN // 2) * 2,  # an even number: the batch kernel takes two at a time
        s_item_bytes=TILE * RUN * layout.salient_bits // 8,
        blocks=layout.blocks if direct else 1,
        block_size=layout.block_size if direct else len(q_columns) + len(salient),
        q_runs_per_block=len(groups) // (layout.blocks if direct else 1),
        q_valid=layout.quantized if direct else len(q_columns),
        q_offset=layout.salient if direct else 0,
        s_runs_per_block=max(1, s_per_block),
        s_valid=layout.salient if direct else len(salient),
        s_offset=0 if direct else len(q_columns),
    )
    salient = pad(salient, (0, form.s_items * RUN - len(salient)), value=-1)
    runs = _Runs(pad(q_columns, (0, short * RUN), value=-1), pad(groups, (0, short), value=-1), salient)
    return form, gather, runs


def boxable(form: Form) -> bool:
    """Whether the batch kernel can read the runs of x where they lie: whole runs, and whole blocks per item or whole items per block."""
    per_block = form.q_runs_per_block
    quantized = form.q_valid % RUN == 0 and (form.blocks == 1 or per_block % form.runs == 0 or form.runs % per_block == 0)
    precise = form.s_runs_per_block * RUN <= form.block_size and (form.blocks == 1 or form.s_runs_per_block == 1 or form.s_runs_per_block % 2 == 0)
    return quantized and (precise or not form.s_items)


def boxed(form: Form) -> tuple[Form, torch.Tensor]:
    """The form of x with its runs one after another, and the gather that makes such an x (`form.columns` reads a zero)."""
    q_runs = torch.arange(form.q_items * form.runs)
    s_runs = torch.arange(form.s_items)
    parts = []
    for run, per_block, valid, offset in (
        (q_runs, form.q_runs_per_block, form.q_valid, form.q_offset),
        (s_runs, form.s_runs_per_block, form.s_valid, form.s_offset),
    ):
        within = 32 * (run % per_block)[:, None] + torch.arange(RUN)
        block = (run // per_block)[:, None]
        there = (within < valid) & (block < form.blocks)
        parts.append(torch.where(there, block * form.block_size + offset + within, form.columns).flatten())
    quantized = len(q_runs) * RUN
    gather = torch.cat(parts)
    plain = replace(
        form, blocks=1, block_size=len(gather), q_runs_per_block=len(q_runs), q_valid=quantized, q_offset=0,
        s_runs_per_block=max(1, len(s_runs)), s_valid=len(s_runs) * RUN, s_offset=quantized,
    )  # fmt: skip
    return plain, gather


def _quantized_runs(layout: LinearLayout) -> tuple[torch.Tensor, torch.Tensor, list[int]]:
    """Quantized columns cut into runs that never cross a group: columns (-1: padding), group per run, runs per group."""
    columns, groups, counts = [], [], []
    start = 0
    for block in range(layout.blocks):
        for g in range(layout.groups_per_block):
            length = min(layout.group_size, layout.quantized - g * layout.group_size)
            count = -(-length // RUN)
            columns.append(torch.nn.functional.pad(torch.arange(start, start + length), (0, count * RUN - length), value=-1))
            groups += [block * layout.groups_per_block + g] * count
            counts.append(count)
            start += length
    return torch.cat(columns), torch.tensor(groups), counts


def repack(layout: LinearLayout, tensors: Mapping[str, torch.Tensor], form: Form, runs: _Runs, dtype: torch.dtype) -> torch.Tensor:
    """The stream (stream_bytes,), uint8."""
    device = tensors["qweight"].device
    stream = torch.empty(form.stream_bytes, dtype=torch.uint8, device=device)
    parts = []  # (items, T, bytes)
    for offset, items, each in (
        (0, form.q_items, form.code_bytes),
        (form.scales_offset, form.q_items, form.scale_bytes),
        (form.salient_offset, form.s_items, form.s_item_bytes),
    ):
        size = items * form.tiles * each
        parts.append(stream[offset : offset + size].view(items, form.tiles, each))
    stream[form.salient_offset - 128 : form.salient_offset] = 0
    stream[-SLACK_BYTES:] = 0
    where = _Runs(runs.quantized.to(device), runs.groups.to(device), runs.salient.to(device))
    zeros_NG = unpack_zeros(tensors["zeros"], layout.zero_bits, layout.out_features)
    step = max(TILE, CHUNK_BYTES // (8 * form.columns) // TILE * TILE)
    for first in range(0, layout.out_features, step):
        rows = slice(first, min(first + step, layout.out_features))
        for part, made in zip(parts, _repack_rows(layout, tensors, zeros_NG, form, where, dtype, rows), strict=True):
            tiles = made.shape[0]
            part[:, first // TILE : first // TILE + tiles] = made.view(tiles, *part.shape[::2]).transpose(0, 1)
    return stream


def _repack_rows(
    layout: LinearLayout,
    tensors: Mapping[str, torch.Tensor],
    zeros_NG: torch.Tensor,
    form: Form,
    runs: _Runs,
    dtype: torch.dtype,
    rows: slice,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Codes, scales and salient runs (T, bytes) of some whole row tiles (the last may be ragged)."""
    codes = _take(unpack(tensors["qweight"][rows], layout.bits, layout.blocks * layout.quantized), runs.quantized, 0)
    tiles = codes.shape[0] // TILE
    per_group = runs.groups[:: form.group_runs]
    scales = _by_lane(_take(tensors["scales"][rows], per_group, 0))
    constant = 1024 if dtype == torch.float16 else 0 if form.bits == 8 else 128  # what a code is set into, see csrc/format.cuh
    offsets = _by_lane(-(_take(zeros_NG[rows], per_group, 0) + constant)).to(dtype)
    groups = torch.cat((scales.contiguous().view(torch.int16), offsets.contiguous().view(torch.int16)), dim=-1).view(torch.uint8).view(tiles, -1)
    precise = torch.empty(tiles, 0, dtype=torch.uint8, device=codes.device)
    if layout.salient and layout.salient_bits == 16:
        pieces = _fragments(_take(tensors["salient"][rows].to(dtype), runs.salient, 0), 32)
        precise = pieces.permute(0, 3, 4, 2, 6, 5, 1, 7).contiguous().view(torch.uint8).view(tiles, -1)
    elif layout.salient:
        precise = _byte_words(_take(tensors["salient"][rows].int() + 128, runs.salient, 128), 32).view(torch.uint8).view(tiles, -1)
    return _planes(_unit_words(codes, form.bits), form.units), groups, precise


def _take(values_NC: torch.Tensor, columns: torch.Tensor, missing: int) -> torch.Tensor:
    """Columns of a matrix by index, `missing` where the index is -1, with rows of `missing` up to a multiple of 16."""
    padded = torch.nn.functional.pad(values_NC, (0, 1, 0, -values_NC.shape[0] % TILE), value=missing)
    return padded[:, columns]


def _by_lane(values_NG: torch.Tensor) -> torch.Tensor:
    """(T, G, 8, 2): rows g and g + 8 of a tile next to each other."""
    return values_NG.view(-1, 2, 8, values_NG.shape[1]).permute(0, 3, 2, 1)


def _fragments(values_NJ: torch.Tensor, width: int) -> torch.Tensor:
    """(T, row half, g, stretch of `width` channels, step j, half h, t, e): channel 16 j + 8 h + 2 t + e of row 8 half + g."""
    n, channels = values_NJ.shape
    return values_NJ.view(n // TILE, 2, 8, channels // width, width // 16, 2, 4, 2)


def _int32(words: torch.Tensor) -> torch.Tensor:
    """int64 values of 32 bits as int32."""
    return torch.where(words >= 1 << 31, words - (1 << 32), words).to(torch.int32)


def _unit_words(codes_NJ: torch.Tensor, bits: int) -> torch.Tensor:
    """Words (T, U, lane, words of a unit) of codes (N, J), J a multiple of 64."""
    if bits == 8:
        return _byte_words(codes_NJ, 64)
    pieces = _fragments(codes_NJ, 64).permute(0, 3, 2, 6, 4, 5, 1, 7).to(torch.int64)  # T U g t j h half e: pair p = 2 h + half
    pairs = (pieces[..., 0] | pieces[..., 1] << 16).flatten(4)
    pairs = pairs.reshape(*pairs.shape[:2], 32, 16)
    if bits == 2:
        words = [sum(pairs[..., 8 * word + p] << (2 * p + 2) % 16 for p in range(8)) for word in range(2)]
    elif bits == 4:
        words = [sum(pairs[..., 4 * j + p] << (4 * p) for p in range(4)) for j in range(4)]
    else:
        words = [
            sum(pairs[..., pair] << (3 * at) for at, pair in enumerate(held)) | ((pairs[..., 15] >> i) & 0x00010001) << 15
            for i, held in enumerate(THREE_BIT_PAIRS)
        ]
    return _int32(torch.stack([torch.as_tensor(word) for word in words], dim=-1))


def _byte_words(codes_NJ: torch.Tensor, width: int) -> torch.Tensor:
    """Words (T, stretch, lane, words) of 8-bit codes in stretches of `width` channels: per step one word of row g, one of row g + 8."""
    pieces = _fragments(codes_NJ, width).permute(0, 3, 2, 6, 4, 1, 5, 7)  # T stretch g t j half h e
    return pieces.to(torch.uint8).contiguous().view(*pieces.shape[:2], 32, width // 8, 4).view(torch.int32).squeeze(-1)


def _planes(words: torch.Tensor, units: int) -> torch.Tensor:
    """Blocks of `units` units as bytes (T, blocks of codes): four words of every lane, then the next four."""
    tiles, _, lanes, each = words.shape
    words = words.view(tiles, -1, units, lanes, each).transpose(2, 3).reshape(tiles, -1, lanes, units * each)
    planes = [words[..., i : i + 4].flatten(2) for i in range(0, units * each, 4)]
    return torch.cat(planes, dim=2).contiguous().view(torch.uint8).view(tiles, -1)
