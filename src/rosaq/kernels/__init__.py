"""Kernels for y = x W^T of a quantized linear layer, and the one place that chooses among them.

A kernel is a module with four names:

- `NAME`: what reports call it;
- `why_not(layout, device, dtype)`: None where it can run, otherwise one sentence that says what is in the way;
- `prepare(layout, tensors, dtype)`: the stored tensors in the form that it reads (done once per layer);
- `run(x_MK, prepared)`: y (M, N) in the type of x, for any number of tokens M >= 0 and any stride of x.

`reference.py` defines what all of them compute. Rule of choice: the first of `KERNELS` that has no reason against it.
`cuda` is for Hopper, `triton` for any GPU, `cpu` for processors. `dequantized` comes last because it can always run; it serves float32 and
float64, and devices that no kernel here knows.
"""

from collections.abc import Mapping, Sequence
from types import ModuleType
from typing import Any

import torch

from rosaq.kernels import cpu, cuda, dequantized, portable
from rosaq.layout import LinearLayout

KERNELS: tuple[ModuleType, ...] = (cuda, portable, cpu, dequantized)


def kernel_names() -> tuple[str, ...]:
    """Names that `choose` takes, the preferred kernel first."""
    return tuple(kernel.NAME for kernel in KERNELS)


def reasons(layout: LinearLayout, device: torch.device, dtype: torch.dtype) -> dict[str, str | None]:
    """For each kernel, what keeps it from running this layer, or None where it can."""
    return {kernel.NAME: kernel.why_not(layout, torch.device(device), dtype) for kernel in KERNELS}


def choose(layout: LinearLayout, device: torch.device, dtype: torch.dtype, names: Sequence[str] | None = None) -> ModuleType:
    """The kernel that runs this layer on `device` for activations of type `dtype`.

    Args:
        layout: form of the layer.
        device: where the stored tensors and the activations lie.
        dtype: type of the activations.
        names: kernels to choose from; by default all.

    Raises:
        ValueError: an unknown name, or no kernel can run the layer (each one's reason is given).
    """
    unknown = set(names or ()) - set(kernel_names())
    if unknown:
        raise ValueError(f"unknown kernels {sorted(unknown)}; there are {kernel_names()}")
    against = []
    for kernel in KERNELS:
        if names is not None and kernel.NAME not in names:
            continue
        reason = kernel.why_not(layout, torch.device(device), dtype)
        if reason is None:
            return kernel
        against.append(f"{kernel.NAME}: {reason}")
    raise ValueError(f"no kernel runs {layout} on {device} for {dtype} activations. " + "; ".join(against))


def matmul(x: torch.Tensor, layout: LinearLayout, tensors: Mapping[str, torch.Tensor], names: Sequence[str] | None = None) -> torch.Tensor:
    """Compute y (..., N) = x (..., K) W^T + b with the chosen kernel, preparing the weight anew (`RosaqLinear` keeps it)."""
    kernel = choose(layout, x.device, x.dtype, names)
    return apply(kernel, kernel.prepare(layout, tensors, x.dtype), x, layout.out_features)


def apply(kernel: ModuleType, prepared: Any, x: torch.Tensor, out_features: int) -> torch.Tensor:
    """Run a kernel, which takes two dimensions, on x of any number of dimensions: y (..., N)."""
    if x.dim() == 2:
        return kernel.run(x, prepared)
    y_MN = kernel.run(x.reshape(-1, x.shape[-1]), prepared)
    return y_MN.view(*x.shape[:-1], out_features)
