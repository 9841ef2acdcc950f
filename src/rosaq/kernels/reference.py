"""What a quantized linear layer computes: the definition that every faster kernel is held to.

y_MN = x_MK W_NK^T + b_N, where the salient columns of W are stored as they are (or as 8-bit integers with one scale
per output) and the others are (code - zero) * scale per group (ROSAQ Eq. 3, arXiv:2506.13472), at 2 bits (4 code - zero) * scale.
M tokens, N outputs, K inputs, Q quantized channels, S salient channels, G groups.
"""

from collections.abc import Mapping

import torch

from rosaq.layout import LinearLayout
from rosaq.packing import unpack, unpack_zeros


def dequantize(layout: LinearLayout, tensors: Mapping[str, torch.Tensor], dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """The weight (N, K) that the stored tensors mean, in `dtype`, columns in the order of the layer's own input."""
    scales_NG = tensors["scales"]
    device, n = scales_NG.device, layout.out_features
    columns = layout.quantized_columns().to(device)
    group = layout.column_groups().to(device)
    codes_NQ = unpack(tensors["qweight"], layout.bits, columns.numel())
    zeros_NG = unpack_zeros(tensors["zeros"], layout.zero_bits, n)
    weight_NK = torch.empty(n, layout.in_features, dtype=dtype, device=device)
    weight_NK[:, columns] = (layout.code_step * codes_NQ - zeros_NG[:, group]).to(dtype) * scales_NG.to(dtype)[:, group]
    if layout.salient:
        precise_NS = tensors["salient"].to(dtype)
        if layout.salient_bits == 8:
            precise_NS = precise_NS * tensors["salient_scales"].to(dtype)[:, None]
        weight_NK[:, layout.salient_columns().to(device)] = precise_NS
    if layout.ordered:  # column j of the stored weight meets input channel order[j]
        ordered = torch.empty_like(weight_NK)
        ordered[:, tensors["order"].long()] = weight_NK
        weight_NK = ordered
    return weight_NK


def matmul(x: torch.Tensor, layout: LinearLayout, tensors: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """The product: y (..., N) = x (..., K) times the dequantized weight, plus the bias, in the type of x."""
    bias = tensors.get("bias")
    return torch.nn.functional.linear(x, dequantize(layout, tensors, x.dtype), None if bias is None else bias.to(x.dtype))
