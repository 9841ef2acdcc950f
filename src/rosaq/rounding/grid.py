"""The grid: asymmetric integers per group of input channels, and INT8 for salient channels and tables.

w is stored as a code q with (q - zero) * scale nearest to w; scale is FP16 and spans the group's range including 0
over 2^b - 1 steps, zero is an integer code (ROSAQ section 4; the grid of GPTQ and AWQ), at 2 bits a quarter of one: here scale is that of a
code's step and zero counts steps; `layout.code_step` is between them and what is stored. Shape letters: N outputs,
K inputs, Q quantized channels, S salient channels, B blocks, G groups, C channels of a full group.
"""

import torch

from rosaq.layout import LinearLayout, code_step

FP16_MAX = 65504.0
FP16_TINY = 2.0**-24  # the smallest FP16 above zero


def grouped(weight_NQ: torch.Tensor, layout: LinearLayout) -> torch.Tensor:
    """Quantized channels (N, Q) as (N, G, C); a shorter last group of a block is filled up with zeros.

    Zeros do not change a range that includes 0, so the filling never reaches scale or zero point.
    """
    n, spare = weight_NQ.shape[0], layout.groups_per_block * layout.group_size - layout.quantized
    blocks = weight_NQ.reshape(n, layout.blocks, layout.quantized)
    return torch.nn.functional.pad(blocks, (0, spare)).reshape(n, layout.groups, layout.group_size)


def ungrouped(values_NGC: torch.Tensor, layout: LinearLayout) -> torch.Tensor:
    """The inverse of `grouped`, (N, Q)."""
    n = values_NGC.shape[0]
    return values_NGC.reshape(n, layout.blocks, -1)[:, :, : layout.quantized].reshape(n, -1)


def fit_grid(weight_NGC: torch.Tensor, bits: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Scale and zero point (N, G) of each group by its minimum and maximum; values that can be stored.

    Raises:
        ValueError: a range that no FP16 scale spans.
    """
    top, step = (1 << bits) - 1, code_step(bits)
    low, high = weight_NGC.amin(-1).clamp_max(0), weight_NGC.amax(-1).clamp_min(0)
    scale, widest = (high - low) / (step * top), float((high - low).max())  # the only wait for a GPU
    if widest > FP16_MAX * step * top:
        raise ValueError(f"a group of weights spans {widest:.3g}, more than an FP16 scale of a {bits}-bit grid can hold")
    scale = scale.half().to(weight_NGC.dtype)
    scale = torch.where(scale == 0, torch.full_like(scale, FP16_TINY if widest else 1.0), scale)
    return step * scale, torch.round(-low / scale).clamp(0, step * top) / step


def to_codes(weight_NGC: torch.Tensor, scale_NG: torch.Tensor, zero_NG: torch.Tensor, bits: int) -> torch.Tensor:
    """The nearest code (N, G, C) of each weight."""
    return torch.round(weight_NGC / scale_NG[..., None] + zero_NG[..., None]).clamp(0, (1 << bits) - 1)


def round_to_nearest(weight_NQ: torch.Tensor, layout: LinearLayout) -> torch.Tensor:
    """The weight (N, Q) after a trip through the grid: what rounding to nearest stores, as numbers."""
    weight = grouped(weight_NQ, layout)
    scale, zero = fit_grid(weight, layout.bits)
    return ungrouped((to_codes(weight, scale, zero, layout.bits) - zero[..., None]) * scale[..., None], layout)


def store_salient(weight_NS: torch.Tensor, layout: LinearLayout) -> dict[str, torch.Tensor]:
    """The stored tensors of the salient channels: FP16, or INT8 with one scale per output."""
    if layout.salient_bits == 16:
        if float(weight_NS.abs().max()) > FP16_MAX:
            raise ValueError(f"a salient weight is {float(weight_NS.abs().max()):.3g}, beyond FP16")
        return {"salient": weight_NS.half()}
    scale = (weight_NS.abs().amax(1) / 127).half().to(weight_NS.dtype).clamp_min(FP16_TINY)
    codes = torch.round(weight_NS / scale[:, None]).clamp(-127, 127)
    return {"salient": codes.to(torch.int8), "salient_scales": scale.half()}
