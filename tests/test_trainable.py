"""`TrainableLinear`: exact gradients, the stored values to begin with, no dense weight kept."""

import pytest
import torch

from rosaq.distillation.trainable import TrainableLinear, group_sums
from rosaq.kernels.reference import dequantize
from rosaq.layout import LinearLayout
from rosaq.linear import RosaqLinear
from rosaq.packing import unpack, unpack_zeros
from rosaq.rounding.linear import quantize_linear

LAYOUTS = {
    "int4, int8 salient, one block": LinearLayout(20, 72, 4, 16, salient=8, salient_bits=8),
    "int3, float16 salient, heads, ragged groups": LinearLayout(12, 96, 3, 16, blocks=4, salient=4),
    "int2, int8 salient": LinearLayout(20, 72, 2, 16, salient=8, salient_bits=8),
    "ordered, with bias": LinearLayout(16, 48, 4, 32, salient=8, bias=True, ordered=True),
    "nothing salient, 8 bits": LinearLayout(9, 40, 8, 16),
}


def packed(layout: LinearLayout) -> RosaqLinear:
    torch.manual_seed(3)
    module = RosaqLinear(layout)
    order = torch.randperm(layout.in_features) if layout.ordered else None
    tensors = quantize_linear(torch.randn(layout.out_features, layout.in_features), layout, order)
    module.load_state_dict({**tensors, **({"bias": torch.randn(layout.out_features).half()} if layout.bias else {})})
    return module


def through(value, rounded):
    """A rounding that the gradient does not see."""
    return value + (rounded - value).detach()


def reference_product(x, packed, ratio, salient, codes):
    """The product by plain autograd, column by column of the stored form."""
    form, t = packed.layout, packed.tensors()
    columns, group = form.quantized_columns(), form.column_groups()
    differences = (
        form.code_step * unpack(t["qweight"], form.bits, columns.numel()) - unpack_zeros(t["zeros"], form.zero_bits, form.out_features)[:, group]
    )
    scales = ratio * t["scales"].double()
    weight = torch.zeros(form.out_features, form.in_features, dtype=torch.float64)
    low = -unpack_zeros(t["zeros"], form.zero_bits, form.out_features)[:, group].double()
    steps = (
        differences.double()
        if codes is None
        else through(codes, form.code_step * torch.round((codes - low) / form.code_step).clamp(0, 2**form.bits - 1) + low)
    )
    weight = weight.index_copy(1, columns, steps * through(scales, scales.half().double())[:, group])
    if salient is not None and form.salient_bits == 8:
        step = t["salient_scales"].double()[:, None]
        salient = through(salient, torch.round(salient / step).clamp(-127, 127) * step)
    elif salient is not None:
        salient = through(salient, salient.half().double())
    if salient is not None:
        weight = weight.index_copy(1, form.salient_columns(), salient)
    x = x[..., t["order"].long()] if form.ordered else x
    return x @ weight.T + (t["bias"].double() if form.bias else 0)


@pytest.mark.parametrize("codes", [False, True])
@pytest.mark.parametrize("name", LAYOUTS)
def test_gradients_are_those_of_autograd(name, codes):
    source = packed(LAYOUTS[name])
    layer = TrainableLinear(source, torch.float64, codes).double()
    with torch.no_grad():  # away from the start, where every rounding is exact
        for parameter in layer.parameters():
            parameter.mul_(1 + (0.3 if parameter is layer.codes else 0.05) * torch.randn_like(parameter))
    x = torch.randn(2, 5, source.in_features, dtype=torch.float64, requires_grad=True)
    given = {"x": x, "ratio": layer.ratio, "salient": layer.salient, "codes": layer.codes}
    copied = {key: None if tensor is None else tensor.detach().clone().requires_grad_() for key, tensor in given.items()}
    wanted_of, copies = ([tensor for tensor in each.values() if tensor is not None] for each in (given, copied))
    y = layer(x)
    wanted = reference_product(copied["x"], source, copied["ratio"], copied["salient"], copied["codes"])
    torch.testing.assert_close(y, wanted, rtol=1e-12, atol=1e-12)
    weights = torch.randn_like(y)
    for got, want in zip(torch.autograd.grad((y * weights).sum(), wanted_of), torch.autograd.grad((wanted * weights).sum(), copies), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("codes", [False, True])
@pytest.mark.parametrize("name", LAYOUTS)
def test_what_is_not_trained_is_stored_as_it_was(name, codes):
    source = packed(LAYOUTS[name])
    layer = TrainableLinear(source, torch.float32, codes)
    tensors = source.tensors()
    assert torch.equal(layer.weight(torch.float32), dequantize(source.layout, tensors))
    assert ("qweight" in layer.stored()) == codes
    assert all(torch.equal(tensor, tensors[part]) for part, tensor in layer.stored().items())


@pytest.mark.parametrize("codes", [False, True])
@pytest.mark.parametrize("name", LAYOUTS)
def test_half_of_the_way_back(name, codes):
    source = packed(LAYOUTS[name])
    layer = TrainableLinear(source, torch.float32, codes)
    first = [parameter.detach().clone() for parameter in layer.parameters()]
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.add_(torch.randn_like(parameter))
    last = [parameter.detach().clone() for parameter in layer.parameters()]
    layer.go_half_back(source.tensors().get("salient"))
    for start, end, half in zip(first, last, layer.parameters(), strict=True):
        torch.testing.assert_close(half.detach(), (start + end) / 2)


def test_no_dense_weight_is_kept_for_the_backward_pass():
    layer = TrainableLinear(packed(LAYOUTS["int4, int8 salient, one block"]), torch.float32)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor.shape) or tensor, lambda tensor: tensor):
        layer(torch.randn(3, 72, requires_grad=True))
    assert set(kept) == {(3, 72), layer.ratio.shape, layer.salient.shape}


def test_group_sums():
    form = LAYOUTS["int3, float16 salient, heads, ragged groups"]
    values = torch.randn(12, form.blocks * form.quantized, dtype=torch.float64)
    wanted = torch.zeros(12, form.groups, dtype=torch.float64).index_add(1, form.column_groups(), values)
    torch.testing.assert_close(group_sums(values, form), wanted)
