"""Decoding on the CPU with PyTorch's int4 product, `torch._weight_int4pack_mm_for_cpu`.

That operation multiplies bf16 activations with W = (code - 8) * scale + offset, codes of 4 bits in groups of 32, 64, 128 or 256
channels, accumulating in float32; only its bf16 form is vectorised. Every layout is written in its terms:

- 3- and 4-bit codes are taken as they are, 2-bit codes times four: offset = (8 - zero) * scale;
- an 8-bit code, salient INT8 channels included, is 16 high + low: its channels appear twice, once with 16 times the scale;
- a group whose length the operation does not know is cut into groups of 32, the last one padded with channels that read a zero;
- the output is padded to a multiple of 16.

So one gather of x and one product do the whole layer; FP16 salient channels add one bf16 product. Above `MAX_TOKENS` tokens the weight
is dequantized to bf16 and multiplied, which is faster there. Scales are rounded from float16 to bf16: results agree with the reference
to bf16 accuracy (2^-8 relative to the largest term), also for float16 activations, which are computed as bf16.

M tokens, N outputs, K inputs, J gathered channels, H groups of the operation.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from rosaq.kernels import dequantized
from rosaq.layout import LinearLayout
from rosaq.packing import unpack, unpack_zeros

NAME = "cpu"
GROUPS = (256, 128, 64, 32)  # what the operation takes
MAX_TOKENS = 128  # measured on 2 Zen 4 cores: above it, dequantizing to bf16 and multiplying is faster
ROWS = 16  # the operation wants a multiple of this many outputs


@dataclass(frozen=True)
class Prepared:
    """One layer in the operation's form."""

    packed: torch.Tensor  # uint8; its byte order depends on the instruction set, so it is never stored
    group: int
    scales_and_offsets: torch.Tensor  # (H, N', 2) bf16
    columns: slice | torch.Tensor | None  # which channels of x the codes meet; index K reads a zero
    padded: bool  # `columns` uses index K
    salient_columns: slice | torch.Tensor
    salient_SN: torch.Tensor | None  # bf16, transposed
    bias: torch.Tensor | None  # bf16
    order: torch.Tensor | None
    plain: dequantized.Prepared


def why_not(layout: LinearLayout, device: torch.device, dtype: torch.dtype) -> str | None:
    """None for bf16 and float16 activations on a CPU."""
    if device.type != "cpu":
        return f"the device is {device}, not a CPU"
    if dtype not in (torch.bfloat16, torch.float16):
        return f"activations are {dtype}; the int4 product is fast and exact enough for bfloat16 and float16 only"
    return None


def prepare(layout: LinearLayout, tensors: Mapping[str, torch.Tensor], dtype: torch.dtype) -> Prepared:
    """Rewrite the stored tensors for the int4 product."""
    n = layout.out_features
    codes_NQ = layout.code_step * unpack(tensors["qweight"], layout.bits, layout.blocks * layout.quantized)
    scales_NG = tensors["scales"].float()
    zeros_NG = unpack_zeros(tensors["zeros"], layout.zero_bits, n).float()
    group = _kernel_group(layout)
    form = _Columns(group, layout.in_features)
    positions, of_group = layout.quantized_columns(), layout.column_groups()
    for g in range(layout.groups):
        mine = (of_group == g).nonzero().flatten()
        form.add(positions[mine], codes_NQ[:, mine], scales_NG[:, g], zeros_NG[:, g], layout.bits)
    salient_SN = None
    if layout.salient and layout.salient_bits == 8:
        centre = torch.full((n,), 128.0)
        form.add(layout.salient_columns(), tensors["salient"].int() + 128, tensors["salient_scales"].float(), centre, 8)
    elif layout.salient:
        salient_SN = tensors["salient"].to(torch.bfloat16).t()
    packed, scales_and_offsets, columns, padded = form.finish()
    bias = tensors.get("bias")
    return Prepared(
        packed=packed,
        group=group,
        scales_and_offsets=scales_and_offsets,
        columns=columns,
        padded=padded,
        salient_columns=slice(0, layout.salient) if layout.blocks == 1 else layout.salient_columns(),
        salient_SN=salient_SN,
        bias=None if bias is None else bias.to(torch.bfloat16),
        order=tensors["order"].long() if layout.ordered else None,
        plain=dequantized.prepare(layout, tensors, dtype),
    )


def run(x_MK: torch.Tensor, prepared: Prepared) -> torch.Tensor:
    """The product (M, N) in the type of x."""
    dtype = x_MK.dtype
    x = x_MK if dtype == torch.bfloat16 else x_MK.to(torch.bfloat16)
    if x.shape[0] > MAX_TOKENS:
        return dequantized.run(x, prepared.plain).to(dtype)
    if prepared.order is not None:
        x = x.index_select(1, prepared.order)
    columns = prepared.columns
    source = torch.nn.functional.pad(x, (0, 1)) if prepared.padded else x
    if isinstance(columns, torch.Tensor):
        source = source.index_select(1, columns)
    elif columns is not None:
        source = source[:, columns]
    n = prepared.plain.layout.out_features
    y = torch._weight_int4pack_mm_for_cpu(source.contiguous(), prepared.packed, prepared.group, prepared.scales_and_offsets)
    if y.shape[1] != n:
        y = y[:, :n]
    if prepared.salient_SN is not None:
        where = prepared.salient_columns
        salient = x.index_select(1, where) if isinstance(where, torch.Tensor) else x[:, where]
        y = torch.addmm(y, salient, prepared.salient_SN)
    if prepared.bias is not None:
        y = y + prepared.bias
    return y if dtype == torch.bfloat16 else y.to(dtype)


def _kernel_group(layout: LinearLayout) -> int:
    """The largest group of the operation that divides every group of the layer; 32, with padding, where none does."""
    lengths = {layout.quantized % layout.group_size or layout.group_size, min(layout.group_size, layout.quantized)}
    if layout.salient and layout.salient_bits == 8:
        lengths.add(layout.blocks * layout.salient)
    return next((g for g in GROUPS if all(length % g == 0 for length in lengths)), GROUPS[-1])


class _Columns:
    """Collects the channels of a layer, group by group, in the form of the int4 product."""

    def __init__(self, group: int, pad: int) -> None:
        self.group, self.pad = group, pad
        self.positions: list[torch.Tensor] = []
        self.codes: list[torch.Tensor] = []
        self.scales: list[torch.Tensor] = []
        self.offsets: list[torch.Tensor] = []

    def add(self, positions: torch.Tensor, codes_NJ: torch.Tensor, scale_N: torch.Tensor, zero_N: torch.Tensor, bits: int) -> None:
        """Append channels that share one scale and zero point per output."""
        if bits <= 4:
            scale = scale_N.bfloat16().float()
            self._append(positions, codes_NJ, scale, (8 - zero_N) * scale)
            return
        scale = scale_N.bfloat16().float()  # 16 times it is exact, so high and low stay in proportion
        high = ((135.5 - zero_N) * scale).bfloat16().float()
        self._append(positions, codes_NJ >> 4, 16 * scale, high)
        self._append(positions, codes_NJ & 15, scale, (136 - zero_N) * scale - high)

    def _append(self, positions: torch.Tensor, codes_NJ: torch.Tensor, scale_N: torch.Tensor, offset_N: torch.Tensor) -> None:
        short = -len(positions) % self.group
        self.positions.append(torch.nn.functional.pad(positions, (0, short), value=self.pad))
        self.codes.append(torch.nn.functional.pad(codes_NJ, (0, short)))
        runs = self.codes[-1].shape[1] // self.group
        self.scales.append(scale_N[:, None].expand(-1, runs))
        self.offsets.append(offset_N[:, None].expand(-1, runs))

    def finish(self) -> tuple[torch.Tensor, torch.Tensor, slice | torch.Tensor | None, bool]:
        """Packed codes, scales with offsets, the channels of x that they meet, and whether some of those are padding."""
        positions, codes_NJ = torch.cat(self.positions), torch.cat(self.codes, dim=1)
        pairs = torch.stack((torch.cat(self.scales, dim=1), torch.cat(self.offsets, dim=1)), dim=-1).transpose(0, 1)
        short = -codes_NJ.shape[0] % ROWS
        codes_NJ = torch.nn.functional.pad(codes_NJ, (0, 0, 0, short)).int().contiguous()
        pairs = torch.nn.functional.pad(pairs, (0, 0, 0, short)).to(torch.bfloat16).contiguous()
        packed = torch._convert_weight_to_int4pack_for_cpu(codes_NJ, 1)
        padded = bool((positions == self.pad).any())
        columns: slice | torch.Tensor | None = positions
        first = int(positions[0])
        if torch.equal(positions, torch.arange(first, first + len(positions))):
            columns = None if first == 0 and len(positions) == self.pad else slice(first, first + len(positions))
        return packed, pairs, columns, padded
