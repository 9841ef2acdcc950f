"""`TrainableLinear`: a packed linear layer whose scales, salient weights and codes can be trained; zero points stay.

w = (code - zero) h(ratio scale) per group, h rounding to float16 as it is stored; a salient weight is rounded to its
stored form, and a code that is trained to the nearest one that there is. All roundings are straight through: the gradient
passes as if they were not there. N outputs, K inputs, B blocks, Q quantized channels per block, S salient channels of all
blocks, G groups.
"""

import functools
from typing import Any

import torch
from torch.utils.checkpoint import checkpoint

from rosaq.architecture import FINAL_NORM, HEAD, HEAD_NORMS, NORMS
from rosaq.layout import LinearLayout
from rosaq.linear import RosaqLinear
from rosaq.norm import RotatedNorm
from rosaq.packing import pack, unpack, unpack_zeros

PARTS = ("scales", "salient", "norms", "codes")  # what is trained, in the order of `Settings.learning_rates`


class Product(torch.autograd.Function):
    """y (..., N) = x (..., K) W^T, W made anew in the backward pass, so that no dense weight is kept in between."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, layer: "TrainableLinear", *trained: torch.Tensor | None) -> torch.Tensor:
        """The product in the type of x; the parameters are passed beside their layer so that autograd sees them."""
        ctx.save_for_backward(x, *trained)
        ctx.layer = layer
        return x @ layer.weight(x.dtype).T

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """Gradients of x and of the layer's parameters, in their types."""
        x, layer, y_gradient = ctx.saved_tensors[0], ctx.layer, gradients[0]
        x_gradient = y_gradient @ layer.weight(x.dtype) if ctx.needs_input_grad[0] else None
        if not any(ctx.needs_input_grad[2:]):
            return x_gradient, *(None for _ in ctx.needs_input_grad[1:])
        weight_gradient_NK = y_gradient.flatten(0, -2).T @ x.flatten(0, -2)
        return x_gradient, None, *layer.gradients(weight_gradient_NK)


class TrainableLinear(torch.nn.Module):
    """A packed layer with the parameters `ratio` (N, G), of its scales, `salient` (N, S), where it has any, and `codes` (N, B Q), if wanted.

    Args:
        packed: the layer; its tensors are read, and it may be dropped afterwards.
        compute: type of the product; x comes and y goes in the type of the model.
        codes: train the codes too, which takes a float32 number a weight.
    """

    differences: torch.Tensor  # codes minus zero points (N, B Q)
    zeros: torch.Tensor  # zero points (N, G)
    columns: torch.Tensor
    groups: torch.Tensor
    salient_columns: torch.Tensor
    base: torch.Tensor  # the scales (N, G) to begin with
    salient_scales: torch.Tensor | None  # (N, 1)
    order: torch.Tensor | None
    bias: torch.Tensor | None

    def __init__(self, packed: RosaqLinear, compute: torch.dtype, codes: bool = False) -> None:
        """Unpack the codes and begin with the stored values, which come out again unless something is trained."""
        super().__init__()
        layout, tensors = packed.layout, packed.tensors()
        self.layout, self.compute = layout, compute
        device = tensors["scales"].device
        columns, groups = layout.quantized_columns().to(device), layout.column_groups().to(device)
        zeros_NG = unpack_zeros(tensors["zeros"], layout.zero_bits, layout.out_features)
        differences_NQ = layout.code_step * unpack(tensors["qweight"], layout.bits, columns.numel()) - zeros_NG[:, groups]
        self._constant("differences", differences_NQ.to(torch.int8 if layout.bits <= 4 else torch.int16))
        self._constant("zeros", zeros_NG.to(torch.int16))
        self._constant("columns", columns)
        self._constant("groups", groups)
        self._constant("salient_columns", layout.salient_columns().to(device))
        self._constant("base", tensors["scales"].float())
        self._constant("salient_scales", tensors["salient_scales"].float()[:, None] if layout.salient and layout.salient_bits == 8 else None)
        self._constant("order", tensors["order"].long() if layout.ordered else None)
        self._constant("bias", tensors["bias"].float() if layout.bias else None)
        self.ratio = torch.nn.Parameter(torch.ones_like(self.base))
        self.salient = None
        if layout.salient:
            self.salient = torch.nn.Parameter(self._salient_weights(tensors["salient"]))
        self.codes = torch.nn.Parameter(self.differences.float()) if codes else None

    def _constant(self, name: str, tensor: torch.Tensor | None) -> None:
        self.register_buffer(name, tensor, persistent=False)

    def _salient_weights(self, stored_NS: torch.Tensor) -> torch.Tensor:
        return stored_NS.float() if self.salient_scales is None else stored_NS * self.salient_scales

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """The product (..., N) in the type of x: what comes out of several layers must be of one type."""
        y = Product.apply(x.to(self.compute), self, self.ratio, self.salient, self.codes).to(x.dtype)
        return y if self.bias is None else y + self.bias.to(y.dtype)

    def scales(self) -> torch.Tensor:
        """Scales (N, G) as stored, in float16."""
        return (self.ratio.detach() * self.base).half()

    def salient_codes(self) -> torch.Tensor:
        """Salient weights (N, S) as stored: float16, or int8 in units of `salient_scales`, which stay as they are."""
        assert self.salient is not None
        if self.salient_scales is None:
            return self.salient.detach().half()
        return torch.round(self.salient.detach() / self.salient_scales).clamp(-127, 127).to(torch.int8)

    def steps(self) -> torch.Tensor:
        """Codes (at 2 bits four times the codes) minus zero points (N, B Q) as stored."""
        if self.codes is None:
            return self.differences
        zero_NQ, step = self.zeros.to(self.codes)[:, self.groups], self.layout.code_step
        return step * torch.round((self.codes.detach() + zero_NQ) / step).clamp(0, (1 << self.layout.bits) - 1) - zero_NQ

    def weight(self, dtype: torch.dtype) -> torch.Tensor:
        """The weight (N, K) that would be stored, in `dtype`, columns in the order of the layer's own input."""
        weight_NK = torch.empty(self.layout.out_features, self.layout.in_features, dtype=dtype, device=self.base.device)
        weight_NK[:, self.columns] = (self.steps() * self.scales().to(self.ratio)[:, self.groups]).to(dtype)
        if self.salient is not None:
            weight_NK[:, self.salient_columns] = self._salient_weights(self.salient_codes()).to(self.salient).to(dtype)
        if self.order is None:
            return weight_NK
        ordered = torch.empty_like(weight_NK)  # column j of the stored weight meets input channel order[j]
        ordered[:, self.order] = weight_NK
        return ordered

    def gradients(self, weight_gradient_NK: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """Gradients of ratio (N, G), salient (N, S) and codes (N, B Q) out of the weight's; None of what there is not."""
        gradient_NK = weight_gradient_NK if self.order is None else weight_gradient_NK[:, self.order]
        gradient_NQ = gradient_NK[:, self.columns].to(self.base)
        ratio_NG = group_sums(gradient_NQ * self.steps(), self.layout) * self.base
        salient_NS = None if self.salient is None else gradient_NK[:, self.salient_columns].to(self.base)
        return ratio_NG, salient_NS, None if self.codes is None else gradient_NQ * self.scales().to(self.base)[:, self.groups]

    @torch.no_grad()
    def go_half_back(self, salient: torch.Tensor | None) -> None:
        """Halve the way from the first values to the present ones; `salient` (N, S) as it was stored, the others' are known."""
        self.ratio.add_(1).mul_(0.5)
        if self.salient is not None and salient is not None:
            self.salient.lerp_(self._salient_weights(salient.to(self.base.device)).to(self.salient), 0.5)
        if self.codes is not None:
            self.codes.lerp_(self.differences.to(self.codes), 0.5)

    def stored(self) -> dict[str, torch.Tensor]:
        """The stored tensors that training may have changed, by name.

        Raises:
            ValueError: a value is not finite, or beyond float16.
        """
        found = {"scales": self.scales()}
        if self.salient is not None:
            found["salient"] = self.salient_codes()
        for name, tensor in (*found.items(), *self.named_parameters()):
            if not torch.isfinite(tensor).all():
                raise ValueError(f"distillation left {name} with values that are not finite; lower the learning rates")
        if self.codes is not None:
            found["qweight"] = pack((self.steps() + self.zeros[:, self.groups]).long() // self.layout.code_step, self.layout.bits)
        return found


def group_sums(values_NQ: torch.Tensor, layout: LinearLayout) -> torch.Tensor:
    """Sums (N, G) over the quantized channels of each group; no scattered addition, whose order a GPU does not fix."""
    blocks = values_NQ.view(-1, layout.blocks, layout.quantized)
    padded = torch.nn.functional.pad(blocks, (0, layout.groups_per_block * layout.group_size - layout.quantized))
    return padded.unflatten(2, (layout.groups_per_block, layout.group_size)).sum(-1).flatten(1)


def make_trainable(model: Any, compute: torch.dtype, codes: bool = False, rerun: bool = True) -> dict[str, list[torch.nn.Parameter]]:
    """Turn a loaded checkpoint into a student, in place: packed layers are replaced.

    Args:
        model: a loaded rosaq checkpoint, in float32; tables and biases stay as they are.
        compute: type of the products within the decoder blocks; lm_head's is float32.
        codes: train the codes, too.
        rerun: blocks keep only their inputs and are run again in the backward pass.

    Returns:
        The parameters to be trained, by the names of PARTS.

    Raises:
        ValueError: a layer transforms its input at run time; names it.
    """
    model.requires_grad_(False)
    trained: dict[str, list[torch.nn.Parameter]] = {part: [] for part in PARTS}
    for name, module in list(model.named_modules()):
        if isinstance(module, RotatedNorm) or (isinstance(module, RosaqLinear) and type(module) is not RosaqLinear):
            raise ValueError(f"{name}: {type(module).__name__} rotates at run time; only checkpoints whose rotations are absorbed can be distilled")
        if isinstance(module, RosaqLinear):
            head = name == HEAD
            layer = TrainableLinear(module, torch.float32 if head else compute, codes and not head)
            model.set_submodule(name, layer.requires_grad_(not head))
            if not head:
                trained["scales"].append(layer.ratio)
                trained["salient"] += [] if layer.salient is None else [layer.salient]
                trained["codes"] += [] if layer.codes is None else [layer.codes]
    trained["norms"] = [parameter.requires_grad_() for name, parameter in model.named_parameters() if is_norm(name)]
    if rerun:
        for block in model.model.layers:  # transformers' own checkpointing works in training mode only, which may switch dropout on
            block.forward = functools.partial(checkpoint, block.forward, use_reentrant=False, preserve_rng_state=False)
    return trained


def is_norm(name: str) -> bool:
    """Whether a parameter of a model is the weight of a norm."""
    within = name.split(".", 3)[-1]
    return name == f"{FINAL_NORM}.weight" or within in HEAD_NORMS or within in {f"{norm}.weight" for norm in NORMS.values()}
