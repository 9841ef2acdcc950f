"""The fused product in Triton: one launch per layer on any GPU that Triton compiles for, from the stored tensors as they are.

Nothing is repacked: codes are taken out of the checkpoint's words, made into weights of the type of x, and multiplied at once, so no
dequantized weight is written to memory. Above `MAX_TOKENS` tokens each weight would be made many times over, and the whole weight is
dequantized once instead. The kernel itself is in `portable_kernel.py`, which only a machine with Triton imports.
Results do not change from run to run: every output is one sum in one order.
"""

import importlib.util
import os
from collections.abc import Mapping
from contextlib import nullcontext

import torch

from rosaq.kernels import dequantized
from rosaq.layout import LinearLayout

NAME = "triton"
MAX_TOKENS = 64  # an estimate
STEPS = (64, 32)  # channels per step: a divisor of the group, so that a step has one scale

Prepared = dequantized.Prepared


def why_not(layout: LinearLayout, device: torch.device, dtype: torch.dtype) -> str | None:
    """None for float16 and bfloat16 activations on a GPU, where Triton is installed."""
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed"
    if device.type not in ("cuda", "xpu") and os.environ.get("TRITON_INTERPRET") != "1":
        return f"the device is {device}, not a GPU"
    if dtype not in (torch.float16, torch.bfloat16):
        return f"activations are {dtype}; it takes float16 and bfloat16"
    return None


def prepare(layout: LinearLayout, tensors: Mapping[str, torch.Tensor], dtype: torch.dtype) -> Prepared:
    """Keep references to the stored tensors."""
    return dequantized.prepare(layout, tensors, dtype)


def run(x_MK: torch.Tensor, prepared: Prepared) -> torch.Tensor:
    """The product (M, N) in the type of x."""
    layout, tensors = prepared.layout, prepared.tensors
    tokens, n = x_MK.shape[0], layout.out_features
    if tokens > MAX_TOKENS:
        return dequantized.run(x_MK, prepared)
    y_MN = torch.empty(tokens, n, dtype=x_MK.dtype, device=x_MK.device)
    if tokens:
        _launch(x_MK, y_MN, layout, tensors)
    return y_MN


def _launch(x_MK: torch.Tensor, y_MN: torch.Tensor, layout: LinearLayout, tensors: Mapping[str, torch.Tensor]) -> None:
    from rosaq.kernels.portable_kernel import product  # noqa: PLC0415

    tokens, n = y_MN.shape
    tile_m, tile_n = (16, 32) if tokens <= 16 else (64, 64)
    step = next((s for s in STEPS if layout.quantized % s == 0 and layout.group_size % s == 0), None)
    nothing = tensors["scales"]  # stands in for tensors that the layer does not have and the kernel does not read
    with torch.cuda.device(x_MK.device) if x_MK.is_cuda else nullcontext():
        product[(-(-n // tile_n), -(-tokens // tile_m))](
            x_MK, y_MN, tensors["qweight"], tensors["scales"], tensors["zeros"],
            tensors.get("salient", nothing), tensors.get("salient_scales", nothing), tensors.get("bias", nothing), tensors.get("order", nothing),
            tokens, n, x_MK.stride(0), x_MK.stride(1), tensors["qweight"].shape[1],
            BITS=layout.bits, CODE_STEP=layout.code_step, ZERO_BITS=layout.zero_bits, GROUP=layout.group_size, GROUPS=layout.groups_per_block,
            BLOCKS=layout.blocks, BLOCK_SIZE=layout.block_size, SALIENT=layout.salient, SALIENT_BYTES=layout.salient_bits == 8, BIAS=layout.bias,
            ORDERED=layout.ordered, ONE_GROUP=step is not None, TILE_M=tile_m, TILE_N=tile_n, STEP=step or 32,
        )  # fmt: skip
