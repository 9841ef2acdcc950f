"""The plain path: dequantize the weight at every call and multiply. Any device, any type, any layout.

It is exact in the type of x, costs a whole dequantized weight of scratch memory, and is slow for few tokens; it
serves prefill, float32 and float64, and devices that no other kernel knows. The arithmetic is `reference.py`'s, with
whole-tensor views where that one gathers column by column.

N outputs, K inputs, B blocks, Q quantized channels per block, S salient channels per block, G groups.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from rosaq.layout import LinearLayout
from rosaq.packing import unpack, unpack_zeros

NAME = "dequantized"


@dataclass(frozen=True)
class Prepared:
    """The stored tensors themselves: nothing is repacked."""

    layout: LinearLayout
    tensors: Mapping[str, torch.Tensor]


def why_not(layout: LinearLayout, device: torch.device, dtype: torch.dtype) -> str | None:
    """None for floating-point activations: this path has no other needs."""
    return None if dtype.is_floating_point else f"activations of type {dtype} are not floating point"


def prepare(layout: LinearLayout, tensors: Mapping[str, torch.Tensor], dtype: torch.dtype) -> Prepared:
    """Keep references to the stored tensors."""
    return Prepared(layout, dict(tensors))


def run(x_MK: torch.Tensor, prepared: Prepared) -> torch.Tensor:
    """The product (M, N) in the type of x."""
    bias = prepared.tensors.get("bias")
    weight_NK = dequantize(prepared.layout, prepared.tensors, x_MK.dtype)
    return torch.nn.functional.linear(x_MK, weight_NK, None if bias is None else bias.to(x_MK.dtype))


def dequantize(layout: LinearLayout, tensors: Mapping[str, torch.Tensor], dtype: torch.dtype) -> torch.Tensor:
    """The weight (N, K) in `dtype`, equal to `reference.dequantize`, in fewer passes over memory."""
    n, blocks, quantized = layout.out_features, layout.blocks, layout.quantized
    differences_NQ = _differences(layout, tensors)
    weight = torch.empty(n, blocks, layout.block_size, dtype=dtype, device=differences_NQ.device)
    differences = differences_NQ.view(n, blocks, quantized)
    scales = tensors["scales"].to(dtype).view(n, blocks, layout.groups_per_block)
    whole = quantized // layout.group_size  # groups of full length; a shorter one may follow
    split = whole * layout.group_size
    target = weight[:, :, layout.salient :]
    if whole:
        shape = (n, blocks, whole, layout.group_size)
        torch.mul(differences[:, :, :split].reshape(shape), scales[:, :, :whole, None], out=target[:, :, :split].unflatten(2, shape[2:]))
    if split < quantized:
        torch.mul(differences[:, :, split:], scales[:, :, whole:], out=target[:, :, split:])
    if layout.salient:
        precise = tensors["salient"].to(dtype)
        if layout.salient_bits == 8:
            precise = precise * tensors["salient_scales"].to(dtype)[:, None]
        weight[:, :, : layout.salient] = precise.view(n, blocks, layout.salient)
    weight_NK = weight.view(n, layout.in_features)
    if layout.ordered:  # column j of the stored weight meets input channel order[j]
        ordered = torch.empty_like(weight_NK)
        ordered[:, tensors["order"].long()] = weight_NK
        return ordered
    return weight_NK


def _differences(layout: LinearLayout, tensors: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """Codes (at 2 bits four times the codes) minus zero points (N, B Q), in the narrowest integer type that holds them."""
    n, blocks, quantized, size = layout.out_features, layout.blocks, layout.quantized, layout.group_size
    columns = blocks * quantized
    narrow = torch.int8 if layout.bits <= 4 else torch.int16
    if layout.bits in (2, 4):
        words = tensors["qweight"].contiguous().view(torch.uint8)
        codes = [(words >> place) & ((1 << layout.bits) - 1) for place in range(0, 8, layout.bits)]
        codes_NQ = torch.stack(codes, dim=-1).view(n, -1)[:, :columns].to(narrow)
    elif layout.bits == 8:
        codes_NQ = tensors["qweight"].contiguous().view(torch.uint8)[:, :columns].to(narrow)
    else:
        codes_NQ = unpack(tensors["qweight"], layout.bits, columns).to(narrow)
    zeros = unpack_zeros(tensors["zeros"], layout.zero_bits, n).to(narrow).view(n, blocks, layout.groups_per_block)
    differences = codes_NQ.mul_(layout.code_step).reshape(n, blocks, quantized)
    whole = quantized // size * size  # channels in groups of full length; a shorter one may follow
    if whole:
        differences[:, :, :whole].unflatten(2, (-1, size)).sub_(zeros[:, :, : whole // size, None])
    if whole < quantized:
        differences[:, :, whole:].sub_(zeros[:, :, -1:])
    return differences.view(n, columns)
