"""Weights to the stored tensors of their layers: the grid of each group, then rounding to nearest or by GPTQ."""

from dataclasses import dataclass, replace

import torch

from rosaq.layout import LinearLayout
from rosaq.packing import pack, pack_zeros
from rosaq.rounding.clipping import fit_clipped_grid, fit_shrunk_grid, group_moments
from rosaq.rounding.gptq import gptq
from rosaq.rounding.grid import fit_grid, grouped, store_salient, to_codes, ungrouped
from rosaq.rounding.refinement import refine


@dataclass(frozen=True)
class Rounding:
    """How weights are rounded.

    Attributes:
        gptq: by error feedback; else to nearest.
        act_order: GPTQ's order by falling second moment.
        clipping: how each group's range is found: "none", from the least to the largest weight; "awq", by AWQ's search; "mse",
            by the squared error of its weights.
        refinement: sweeps over GPTQ's codes afterwards, its scales fitted with each; 0 for none of it.
    """

    gptq: bool = False
    act_order: bool = False
    clipping: str = "none"
    refinement: int = 0


NEAREST = Rounding()


def quantize_linear(
    weight_NK: torch.Tensor,
    layout: LinearLayout,
    order_K: torch.Tensor | None = None,
    moment_KK: torch.Tensor | None = None,
    rounding: Rounding = NEAREST,
) -> dict[str, torch.Tensor]:
    """The stored tensors of a linear layer.

    Args:
        weight_NK: the weight, float32 or float64, in the basis that the layer's input arrives in.
        layout: its form.
        order_K: where given, stored column j is the weight's column order[j].
        moment_KK: second moment of the inputs, in that basis; GPTQ and clipping look at it.
        rounding: how.

    Returns:
        The tensors that `layout.tensors()` names, except the bias, on the weight's device.
    """
    return quantize_stacked([weight_NK], [layout], order_K, moment_KK, rounding)[0]


def quantize_stacked(
    weights: list[torch.Tensor],
    layouts: list[LinearLayout],
    order_K: torch.Tensor | None = None,
    moment_KK: torch.Tensor | None = None,
    rounding: Rounding = NEAREST,
) -> list[dict[str, torch.Tensor]]:
    """`quantize_linear` of several layers with the same inputs and form but for their outputs, at once.

    GPTQ takes as long for all of them as for one: its loop is over the inputs.
    """
    weight_NK = torch.cat(weights)
    layout = replace(layouts[0], out_features=weight_NK.shape[0])
    assert weight_NK.shape[1] == layout.in_features and (order_K is not None) == layout.ordered
    if order_K is not None:
        weight_NK = weight_NK[:, order_K]
        moment_KK = None if moment_KK is None else moment_KK[order_K][:, order_K]
    rows = [part.out_features for part in layouts]
    parts = [part.split(rows) for part in _rounded(weight_NK, layout, moment_KK, rounding)]
    return [_stored(row, form, order_K) for form, row in zip(layouts, zip(*parts, strict=True), strict=True)]


def _rounded(weight_NK: torch.Tensor, layout: LinearLayout, moment_KK: torch.Tensor | None, rounding: Rounding) -> tuple[torch.Tensor, ...]:
    """Codes (N, Q), scales and zero points (N, G), salient weights (N, S)."""
    columns = layout.quantized_columns(weight_NK.device)
    moments_GCC = None
    if rounding.clipping == "awq":
        assert moment_KK is not None
        moments_GCC = group_moments(moment_KK[columns][:, columns], layout)

    def fit(weight_NGC: torch.Tensor, groups: slice, counts_GC: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
        if rounding.clipping == "none":
            return fit_grid(weight_NGC, layout.bits)
        if moments_GCC is None:
            assert counts_GC is not None
            return fit_shrunk_grid(weight_NGC, counts_GC, layout.bits)
        size = weight_NGC.shape[-1]
        return fit_clipped_grid(weight_NGC, moments_GCC[groups, :size, :size], layout.bits)

    if rounding.gptq:
        assert moment_KK is not None
        rounded = gptq(
            weight_NK, moment_KK, layout, lambda weight, group, counts: fit(weight, slice(group, group + 1), counts[None]), rounding.act_order
        )
        return refine(weight_NK, moment_KK, layout, rounded, rounding.refinement) if rounding.refinement else rounded
    weight = grouped(weight_NK[:, columns], layout)
    counts_GC = None if moment_KK is None else grouped(moment_KK.diagonal()[columns][None], layout)[0]
    scale, zero = fit(weight, slice(None), counts_GC)
    codes = ungrouped(to_codes(weight, scale, zero, layout.bits), layout)
    return codes, scale, zero, weight_NK[:, layout.salient_columns(weight_NK.device)]


def _stored(parts: tuple[torch.Tensor, ...], layout: LinearLayout, order_K: torch.Tensor | None) -> dict[str, torch.Tensor]:
    codes_NQ, scale_NG, zero_NG, salient_NS = parts
    stored = {
        "qweight": pack(codes_NQ.to(torch.int64), layout.bits),
        "scales": (scale_NG / layout.code_step).half(),
        "zeros": pack_zeros((zero_NG * layout.code_step).to(torch.int64), layout.zero_bits),
    }
    if layout.salient:
        stored |= store_salient(salient_NS, layout)
    if order_K is not None:
        stored["order"] = order_K.to(torch.int32)
    return stored
