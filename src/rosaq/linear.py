"""`RosaqLinear`: a linear layer whose weight is stored quantized, with a salient part that stays precise.

The module holds the tensors of the checkpoint under their names (`LinearLayout.tensors`), and nothing else is saved. The form that a
kernel reads is made from them at the first call on a device and kept beside them.
"""

from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

import torch
from torch import nn

from rosaq import kernels
from rosaq.kernels.dequantized import dequantize
from rosaq.layout import LinearLayout


class RosaqLinear(nn.Module):
    """A layer y (..., N) = x (..., K) W^T + b with W stored as `layout` says.

    Buffers are persistent, integer or float16 as the checkpoint has them whatever type the model computes in, and
    uninitialised until loaded (so the module can be made on the meta device).

    Args:
        layout: form of the layer.
        device: where the buffers are made.
    """

    def __init__(self, layout: LinearLayout, device: torch.device | str | None = None) -> None:
        """Make uninitialised buffers."""
        super().__init__()
        self.layout = layout
        self.in_features, self.out_features = layout.in_features, layout.out_features
        self._prepared: dict[torch.dtype, tuple[ModuleType, Any]] = {}
        self._allowed: tuple[str, ...] | None = None
        for name, (shape, dtype) in layout.tensors().items():
            self.register_buffer(name, torch.empty(shape, dtype=dtype, device=device))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """The product (..., N) in the type of x."""
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
            kernel = kernels.choose(self.layout, tensors["qweight"].device, dtype, self._allowed)
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
        kernel, _ = self.prepare(dtype)
        if free:
            for name in self.layout.tensors():
                self._buffers[name] = None
        return kernel.NAME

    def allow_kernels(self, names: Sequence[str] | None) -> None:
        """Choose among these kernels only (None: all)."""
        self._allowed = None if names is None else tuple(names)
        self._prepared.clear()

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> "RosaqLinear":
        """Move the buffers, but keep their types: `.to(dtype)` is about activations, the checkpoint's types are the format's."""

        def move(tensor: torch.Tensor) -> torch.Tensor:
            moved = fn(tensor)
            return moved if moved.dtype == tensor.dtype else tensor.to(moved.device)

        self._prepared.clear()
        return super()._apply(move, recurse)

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        """Load, then forget what was prepared from the old values."""
        super()._load_from_state_dict(*args, **kwargs)
        self._prepared.clear()

    def __setattr__(self, name: str, value: Any) -> None:
        """Forget what was prepared when a stored tensor is replaced (loaders assign buffers one by one)."""
        super().__setattr__(name, value)
        if name in self.__dict__.get("_buffers", ()):
            self._prepared.clear()

    def __getstate__(self) -> dict[str, Any]:
        """Copy and pickle without prepared weights: they belong to one device and one process."""
        return {**self.__dict__, "_prepared": {}}

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
