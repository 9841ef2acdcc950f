"""A weight to the stored tensors of its layer, by rounding to nearest or by GPTQ."""

import torch

from rosaq.layout import LinearLayout
from rosaq.packing import pack, pack_zeros
from rosaq.rounding.gptq import gptq
from rosaq.rounding.grid import fit_grid, grouped, store_salient, to_codes, ungrouped


def quantize_linear(
    weight_NK: torch.Tensor, layout: LinearLayout, order_K: torch.Tensor | None = None, moment_KK: torch.Tensor | None = None
) -> dict[str, torch.Tensor]:
    """The stored tensors of a linear layer.

    Args:
        weight_NK: the weight, float32 or float64, in the basis that the layer's input arrives in.
        layout: its form.
        order_K: where given, stored column j is the weight's column order[j].
        moment_KK: second moment of the inputs, in that basis: round by GPTQ. None: round to nearest.

    Returns:
        The tensors that `layout.tensors()` names, except the bias, on the weight's device.
    """
    assert weight_NK.shape == (layout.out_features, layout.in_features) and (order_K is not None) == layout.ordered
    if order_K is not None:
        weight_NK = weight_NK[:, order_K]
        moment_KK = None if moment_KK is None else moment_KK[order_K][:, order_K]
    if moment_KK is None:
        weight = grouped(weight_NK[:, layout.quantized_columns().to(weight_NK.device)], layout)
        scale, zero = fit_grid(weight, layout.bits)
        codes = ungrouped(to_codes(weight, scale, zero, layout.bits), layout)
        salient = weight_NK[:, layout.salient_columns().to(weight_NK.device)]
    else:
        codes, scale, zero, salient = gptq(weight_NK, moment_KK, layout)
    stored = {
        "qweight": pack(codes.to(torch.int64), layout.bits),
        "scales": scale.half(),
        "zeros": pack_zeros(zero.to(torch.int64), layout.zero_bits),
    }
    if layout.salient:
        stored |= store_salient(salient, layout)
    if order_K is not None:
        stored["order"] = order_K.to(torch.int32)
    return stored
