"""A packed model as a plain one: every quantized module becomes an ordinary linear layer or table with the same values.

The plain model is transformers' own of the same family, without any module of rosaq's, so that evaluation runs at
the speed of unquantized weights and any tool can take the weights. In float32 they are exactly what the checkpoint
means: codes, zero points, salient channels and the order of the inputs are resolved by the kernels' own
dequantization. In half precision each weight is rounded once. A rotation after a norm (recipes with rotation
"per-layer") is multiplied into the linear layers that the norm feeds: W (R^T n) = (W R^T) n, in float64.
"""

import copy
from collections.abc import Iterator
from typing import Any

import psutil
import torch

from rosaq.architecture import LINEARS, NORMS, SITE_NORM, SITES
from rosaq.embedding import RosaqEmbedding
from rosaq.kernels.dequantized import dequantize
from rosaq.linear import RosaqLinear
from rosaq.norm import RotatedNorm
from rosaq.skeleton import plain_model

# Name within a block of each linear layer behind a norm -> name of the norm.
_NORM_BEFORE = {LINEARS[role]: NORMS[SITE_NORM[site]] for site, roles in SITES.items() for role in roles if site in SITE_NORM}


def is_packed(model: Any) -> bool:
    """Whether a model has quantized linear layers."""
    return any(isinstance(module, RosaqLinear) for module in model.modules())


def dense_tensors(model: Any, dtype: torch.dtype) -> Iterator[tuple[str, torch.Tensor]]:
    """Parameters of the plain model that computes what `model` does, one module at a time.

    Args:
        model: a loaded rosaq checkpoint; it stays as it is.
        dtype: type of the tensors that come out.

    Yields:
        Name and tensor, on the model's device; a tied lm_head under both names.

    Raises:
        ValueError: a module transforms its input in a way that is not known here; names it.
    """
    for name, module in model.named_modules():
        if not _has_plain_form(module):
            raise ValueError(f"{name}: {type(module).__name__} has no plain form; use the packed model")
        if isinstance(module, RosaqLinear):
            yield f"{name}.weight", _unrotated(model, name, module.dense_weight(torch.float32)).to(dtype)
            if module.layout.bias:
                yield f"{name}.bias", module.get_buffer("bias").to(dtype)
        elif isinstance(module, RosaqEmbedding):
            tensors = {key: module.get_buffer(key) for key in module.layout.tensors()}
            yield f"{name}.weight", dequantize(module.layout, tensors, torch.float32).to(dtype)
        else:
            for key, parameter in module.named_parameters(recurse=False):
                yield f"{name}.{key}", parameter.detach().to(dtype)


def _has_plain_form(module: torch.nn.Module) -> bool:
    """Whether this file knows what a module computes; a subclass with a forward of its own must say its `dense_weight`."""
    if isinstance(module, RosaqLinear):
        return type(module).forward is RosaqLinear.forward or type(module).dense_weight is not RosaqLinear.dense_weight
    return isinstance(module, RosaqEmbedding | RotatedNorm) or not type(module).__module__.startswith("rosaq.")


def _unrotated(model: Any, name: str, weight_NK: torch.Tensor) -> torch.Tensor:
    """A linear layer's weight with the rotation of the norm before it, if there is one, multiplied in."""
    block, within = ".".join(name.split(".")[:3]), name.split(".", 3)[-1]
    if within not in _NORM_BEFORE or not isinstance(norm := model.get_submodule(f"{block}.{_NORM_BEFORE[within]}"), RotatedNorm):
        return weight_NK
    return weight_NK.double() @ norm.get_buffer("rotation").double().T


def dense_model(model: Any, dtype: torch.dtype | None = None) -> Any:
    """The plain model that computes what a loaded rosaq checkpoint does, on the same device, in evaluation mode.

    Args:
        model: a loaded rosaq checkpoint; it stays as it is, and may be dropped afterwards.
        dtype: type of the weights; the model's own by default.
    """
    dtype = dtype or model.dtype
    config = copy.deepcopy(model.config)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    config.dtype = dtype
    plain = plain_model(config, dict(dense_tensors(model, dtype)), dtype, str(model.device))
    plain.generation_config = model.generation_config
    return plain


def dense_bytes(model: Any, dtype: torch.dtype) -> int:
    """Size of the plain model's parameters, a tied table counted once."""
    packed = [module.layout for module in model.modules() if isinstance(module, RosaqLinear | RosaqEmbedding)]
    weights = sum(form.out_features * form.in_features + form.out_features * form.bias for form in packed)
    return (weights + sum(parameter.numel() for parameter in model.parameters())) * dtype.itemsize


def dense_fits(model: Any, dtype: torch.dtype) -> bool:
    """Whether the plain model takes at most half of the memory that is free on the model's device."""
    device = model.device
    free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else psutil.virtual_memory().available
    return 2 * dense_bytes(model, dtype) <= free
