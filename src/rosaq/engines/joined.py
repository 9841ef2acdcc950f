"""Layers with the same input, computed by one product: q, k and v of a block, gate and up.

The code of transformers' models asks for each of them by itself, and a GPU computes a product of few tokens faster than Python launches it.
The first layer of a group that is asked computes all of them and keeps the outputs for the others, which are asked next with the very
same tensor. Whoever is asked with another one, or while gradients are kept, computes by itself. So the code of the model, its modules'
names and their stored tensors stay as they are, and the compiler sees one operation.
"""

from collections.abc import Sequence
from dataclasses import replace
from itertools import accumulate
from typing import Any

import torch

from rosaq import kernels
from rosaq.architecture import LINEARS, SITES
from rosaq.engines.shards import Shard, join
from rosaq.linear import RosaqLinear

DEVICES = ("cuda",)  # elsewhere launches cost nothing beside the products
KERNELS = ("cuda", "triton")  # that compute quantized weights at once; the others dequantize first
WHOLE = ("v",)  # goes into the KV cache as it is: torch.cat of a large cache and a part of rows takes 609 us instead of 108 (docs/log.md)


class JoinedLayers:
    """Layers of one form but for their outputs, in the order in which a model asks for them.

    Args:
        layers: they may be on the meta device; the joined weight is made at the first call on a GPU, or by `build`.
        whole: those whose output is copied out of the joined one, for who is slow with every third part of a row.
    """

    def __init__(self, layers: Sequence[RosaqLinear], whole: Sequence[RosaqLinear] = ()) -> None:
        """Attach to the layers."""
        self.layers = tuple(layers)
        self._whole = {layer.number for layer in whole}
        ends = list(accumulate(layer.out_features for layer in layers))
        self._rows = {layer.number: slice(end - layer.out_features, end) for layer, end in zip(layers, ends, strict=True)}
        self._built: dict[torch.dtype, RosaqLinear | None] = {}
        self._kept: tuple[torch.Tensor, torch.Tensor, int] | None = None  # input, outputs of all, version of the input
        for layer in layers:
            layer.joined = self

    def product(self, layer: RosaqLinear, x: torch.Tensor) -> torch.Tensor:
        """The product (..., N) of one of the layers."""
        kept = self._kept
        if layer is self.layers[0]:
            joined = self._usable(x)
            if joined is None:
                return layer.alone(x)
            y = joined(x)
            self._kept = x, y, _version(x)
        elif kept is None or kept[0] is not x or kept[2] != _version(x):
            return layer.alone(x)
        else:
            y = kept[1]
            if layer is self.layers[-1]:
                self._kept = None
        part = y[..., self._rows[layer.number]]
        return part.contiguous() if layer.number in self._whole and not torch.compiler.is_compiling() else part

    def build(self, dtype: torch.dtype) -> RosaqLinear | None:
        """One layer of all outputs for activations of `dtype`, made once; None where each is computed by itself."""
        if dtype not in self._built:
            self._built[dtype] = self._join(dtype)
        return self._built[dtype]

    def clear(self) -> None:
        """Forget the joined weight: a stored tensor was moved or replaced."""
        self._built.clear()
        self._kept = None

    def _usable(self, x: torch.Tensor) -> RosaqLinear | None:
        if x.requires_grad and torch.is_grad_enabled():
            return None
        return self._built.get(x.dtype) if torch.compiler.is_compiling() else self.build(x.dtype)

    def _join(self, dtype: torch.dtype) -> RosaqLinear | None:
        stored = [layer.tensors() for layer in self.layers]
        devices = {tensors["qweight"].device for tensors in stored}
        if len(devices) > 1 or next(iter(devices)).type not in DEVICES or any(layer.allowed_kernels is not None for layer in self.layers):
            return None
        device, shards = devices.pop(), []
        for layer, tensors in zip(self.layers, stored, strict=True):
            form = replace(layer.layout, bias=False)
            own = {name: tensors[name] for name in form.tensors()}
            shards.append(Shard("", form, range(layer.out_features), layer.out_features, tensors=own))
        layout, joined = join(shards)
        if kernels.choose(layout, device, dtype).NAME not in KERNELS:
            return None
        biased = self.layers[0].layout.bias
        if biased:
            joined["bias"] = torch.cat([tensors["bias"] for tensors in stored])
        linear = RosaqLinear(replace(layout, bias=biased), device="meta")
        for name, tensor in joined.items():
            setattr(linear, name, tensor)
        linear.repack(dtype, free=True)
        return linear


def join_layers(model: Any) -> None:
    """Have the layers of each block that take the same input computed together, where their forms allow it."""
    for block in getattr(model, "model", model).layers:
        for roles in SITES.values():
            layers = [block.get_submodule(LINEARS[role]) for role in roles]
            if len(layers) < 2 or any(type(layer) is not RosaqLinear for layer in layers):
                continue
            forms = {replace(layer.layout, out_features=1) for layer in layers}
            if len(forms) == 1 and not layers[0].layout.ordered:
                JoinedLayers(layers, [layer for role, layer in zip(roles, layers, strict=True) if role in WHOLE])


def _version(x: torch.Tensor) -> int:
    """How often x was changed in place, where that is counted."""
    return 0 if torch.compiler.is_compiling() or x.is_inference() else x._version
