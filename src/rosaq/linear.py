"""`RosaqLinear`: a linear layer whose weight is stored quantized, with a salient part that stays precise.

The module holds the tensors of the checkpoint under their names (`LinearLayout.tensors`), and nothing else is saved. The form that a
kernel reads is made from them at the first call on a device and kept beside them.

Compiled code and autograd see a layer as one operation, `torch.ops.rosaq.linear`: kernels need neither be traceable nor know their
derivative. The stored weight is fixed; the derivative by x is grad W, with W dequantized for the moment.
"""

import itertools
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any
from weakref import WeakValueDictionary

import torch
from torch import nn

from rosaq import kernels
from rosaq.kernels.dequantized import dequantize
from rosaq.layout import LinearLayout

_NUMBERS = itertools.count()
_LAYERS: "WeakValueDictionary[int, RosaqLinear]" = WeakValueDictionary()


class RosaqLinear(nn.Linear):
    """A layer y (..., N) = x (..., K) W^T + b with W stored as `layout` says.

    It is an `nn.Linear` to whom asks for one (adapters do), but its `weight` is None: there are only the stored tensors.

    Buffers are persistent, integer or float16 as the checkpoint has them whatever type the model computes in, and
    uninitialised until loaded (so the module can be made on the meta device).

    Args:
        layout: form of the layer.
        device: where the buffers are made.
    """

    def __init__(self, layout: LinearLayout, device: torch.device | str | None = None) -> None:
        """Make uninitialised buffers."""
        nn.Module.__init__(self)
        self.number = next(_NUMBERS)
        _LAYERS[self.number] = self
        self.layout = layout
        self.in_features, self.out_features = layout.in_features, layout.out_features
        self._prepared: dict[torch.dtype, tuple[ModuleType, Any]] = {}
        self.allowed_kernels: tuple[str, ...] | None = None
        self.joined: Any = None  # engines.joined.JoinedLayers: the layers that take the same input
        for name, (shape, dtype) in layout.tensors().items():
            self.register_buffer(name, torch.empty(shape, dtype=dtype, device=device))
        for name in ("weight",) if layout.bias else ("weight", "bias"):
            self.register_buffer(name, None)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """The product (..., N) in the type of x."""
        return self.alone(x) if self.joined is None else self.joined.product(self, x)

    def alone(self, x: torch.Tensor) -> torch.Tensor:
        """The product by this layer's own weight, whichever layers it is joined with."""
        if torch.compiler.is_compiling() or (x.requires_grad and torch.is_grad_enabled()):
            return torch.ops.rosaq.linear(x, self.number, self.in_features, self.out_features)
        return self._product(x)

    def _product(self, x: torch.Tensor) -> torch.Tensor:
        entry = self._prepared.get(x.dtype)
        if entry is None:
            entry = self.prepare(x.dtype)
        return kernels.apply(entry[0], entry[1], x, self.out_features)

    def tensors(self) -> dict[str, torch.Tensor]:
        """The stored tensors by name.

        Raises:
            ValueError: they were dropped by `repack(free=True)`, or hold no values yet (meta device).
        """
        if any(self._buffers[name] is None for name in self.layout.tensors()):
            raise ValueError("the stored tensors of this layer were dropped by repack(free=True); load the checkpoint again")
        found = {name: self.get_buffer(name) for name in self.layout.tensors()}
        if found["qweight"].is_meta:
            raise ValueError("this layer is on the meta device and holds no values; load its tensors first")
        return found

    def dense_weight(self, dtype: torch.dtype) -> torch.Tensor:
        """The weight (N, K) of the plain layer that computes the same; exact in float32, rounded once in other types."""
        return dequantize(self.layout, self.tensors(), torch.float32).to(dtype)

    @torch.compiler.disable
    def prepare(self, dtype: torch.dtype) -> tuple[ModuleType, Any]:
        """Choose the kernel for activations of `dtype` and make the form of the weight that it reads, once."""
        if dtype not in self._prepared:
            tensors = self.tensors()
            kernel = kernels.choose(self.layout, tensors["qweight"].device, dtype, self.allowed_kernels)
            self._prepared[dtype] = (kernel, kernel.prepare(self.layout, tensors, dtype))
        return self._prepared[dtype]

    def repack(self, dtype: torch.dtype, free: bool = False) -> str:
        """Prepare now rather than at the first call, so that a captured graph or a compiled model finds it done.

        Args:
            dtype: type of the activations.
            free: drop the stored tensors, for an engine that never saves the model. A kernel that reads the stored
                tensors themselves keeps them alive, and no other dtype or device can be prepared afterwards.

        Returns:
            Name of the kernel that will run.
        """
        if self.joined is not None and not free and (joined := self.joined.build(dtype)) is not None:
            return str(joined.repack(dtype))
        kernel, _ = self.prepare(dtype)
        if free:
            for name in self.layout.tensors():
                self._buffers[name] = None
        return kernel.NAME

    def allow_kernels(self, names: Sequence[str] | None) -> None:
        """Choose among these kernels only (None: all)."""
        self.allowed_kernels = None if names is None else tuple(names)
        self._forget()

    def _forget(self) -> None:
        """Drop what was made of the stored tensors."""
        self._prepared.clear()
        if self.joined is not None:
            self.joined.clear()

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> "RosaqLinear":
        """Move the buffers, but keep their types: `.to(dtype)` is about activations, the checkpoint's types are the format's."""

        def move(tensor: torch.Tensor) -> torch.Tensor:
            moved = fn(tensor)
            return moved if moved.dtype == tensor.dtype else tensor.to(moved.device)

        self._forget()
        return super()._apply(move, recurse)

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        """Load, then forget what was prepared from the old values."""
        super()._load_from_state_dict(*args, **kwargs)
        self._forget()

    def __setattr__(self, name: str, value: Any) -> None:
        """Forget what was prepared when a stored tensor is replaced (loaders assign buffers one by one)."""
        super().__setattr__(name, value)
        if name in self.__dict__.get("_buffers", ()):
            self._forget()

    def __getstate__(self) -> dict[str, Any]:
        """Copy and pickle without prepared weights, which belong to one device and one process, and without the layers beside it."""
        return {**self.__dict__, "_prepared": {}, "joined": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """A copy is a layer of its own."""
        super().__setstate__(state)
        self.number = next(_NUMBERS)
        _LAYERS[self.number] = self

    def extra_repr(self) -> str:
        """One line for `print(model)`."""
        form = self.layout
        parts = [f"in_features={form.in_features}", f"out_features={form.out_features}", f"bits={form.bits}", f"group_size={form.group_size}"]
        if form.salient:
            parts.append(f"salient={form.blocks}x{form.salient} at {form.salient_bits} bits")
        return ", ".join(parts + [f"bias={form.bias}"])


class RotatedLinear(RosaqLinear):
    """y = (x R) W^T + b, for recipes whose basis cannot be absorbed (head_rotation "concatenated"), R (K, K) float16."""

    def __init__(self, layout: LinearLayout, device: torch.device | str | None = None) -> None:
        """Make uninitialised buffers, the rotation among them."""
        super().__init__(layout, device)
        self.register_buffer("rotation", torch.empty(layout.in_features, layout.in_features, dtype=torch.float16, device=device))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """The product (..., N) in the type of x."""
        return super().forward(x @ self.get_buffer("rotation").to(x.dtype))

    def dense_weight(self, dtype: torch.dtype) -> torch.Tensor:
        """The weight (N, K) that takes x itself: W R^T."""
        return (super().dense_weight(torch.float32).double() @ self.get_buffer("rotation").double().T).to(dtype)


@torch.library.custom_op("rosaq::linear", mutates_args=())
def _product(x: torch.Tensor, number: int, in_features: int, out_features: int) -> torch.Tensor:
    """The product (..., N) of the layer with this number."""
    with torch.no_grad():
        return _LAYERS[number]._product(x).contiguous()


@torch.library.custom_op("rosaq::linear_backward", mutates_args=())
def _product_backward(grad: torch.Tensor, number: int, in_features: int) -> torch.Tensor:
    """Derivative (..., K) by x."""
    layer = _LAYERS[number]
    return grad @ dequantize(layer.layout, layer.tensors(), grad.dtype)


@_product.register_fake
def _(x: torch.Tensor, number: int, in_features: int, out_features: int) -> torch.Tensor:
    return x.new_empty((*x.shape[:-1], out_features))


@_product_backward.register_fake
def _(grad: torch.Tensor, number: int, in_features: int) -> torch.Tensor:
    return grad.new_empty((*grad.shape[:-1], in_features))


def _keep_number(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    _, ctx.number, ctx.in_features, _ = inputs


def _derivative(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None, None, None]:
    return torch.ops.rosaq.linear_backward(grad, ctx.number, ctx.in_features), None, None, None


_product.register_autograd(_derivative, setup_context=_keep_number)
