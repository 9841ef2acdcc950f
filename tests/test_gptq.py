"""GPTQ: less error of the output than rounding to nearest, and precise channels that take up the rest."""

import importlib.util
import os
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file

from rosaq import Calibration, load_recipe, quantize
from rosaq.kernels.reference import dequantize
from rosaq.layout import LinearLayout
from rosaq.packing import unpack
from rosaq.rounding.gptq import conditional_variances, inverse_factor
from rosaq.rounding.linear import NEAREST, Rounding, quantize_linear, quantize_stacked
from rosaq.rounding.refinement import _fit_scales

GPTQ, ACT_ORDER = Rounding(gptq=True), Rounding(gptq=True, act_order=True)


def correlated(tokens, width, seed=0):
    """Inputs whose channels share a few strong directions."""
    generator = torch.Generator().manual_seed(seed)
    shared = torch.randn(tokens, width // 8, generator=generator) @ torch.randn(width // 8, width, generator=generator)
    return shared + 0.3 * torch.randn(tokens, width, generator=generator)


def output_error(weight, layout, x, moment, rounding=GPTQ):
    got = dequantize(layout, quantize_linear(weight, layout, None, moment, NEAREST if moment is None else rounding))
    return float((x @ (got - weight).T).square().sum())


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("rounding", [GPTQ, ACT_ORDER])
@pytest.mark.parametrize(("blocks", "salient", "salient_bits"), [(1, 0, 16), (1, 16, 16), (4, 4, 16), (1, 16, 8)])
def test_output_error_is_less_than_half_of_rounding_to_nearest(bits, rounding, blocks, salient, salient_bits):
    layout = LinearLayout(24, 128, bits, 32, blocks, salient, salient_bits)
    weight, x = torch.randn(24, 128, generator=torch.Generator().manual_seed(1)), correlated(1000, 128)
    moment = x.T @ x / len(x)
    assert output_error(weight, layout, x, moment, rounding) < 0.5 * output_error(weight, layout, x, None)


def test_uncorrelated_inputs_leave_nothing_to_make_up():
    """With H diagonal there is no feedback, and GPTQ is rounding to nearest."""
    layout = LinearLayout(8, 64, 4, 32, salient=16)
    weight = torch.randn(8, 64, generator=torch.Generator().manual_seed(1))
    moment = torch.diag(torch.linspace(0.1, 5, 64))
    nearest = quantize_linear(weight, layout)
    for rounding in (GPTQ, ACT_ORDER):
        ours = quantize_linear(weight, layout, moment_KK=moment, rounding=rounding)
        assert all(torch.equal(ours[name], nearest[name]) for name in nearest)


def test_salient_channels_are_the_least_squares_fit():
    """Given the codes, no other FP16 part would do better than what the feedback left, damping aside."""
    layout = LinearLayout(6, 64, 3, 16, salient=16)
    weight, x = torch.randn(6, 64, generator=torch.Generator().manual_seed(1)), correlated(2000, 64).double()
    moment = x.T @ x / len(x)
    got = dequantize(layout, quantize_linear(weight, layout, moment_KK=moment, rounding=GPTQ)).double()
    rest = x @ weight.T.double() - x[:, 16:] @ got[:, 16:].T
    best = torch.linalg.lstsq(x[:, :16], rest).solution.T
    assert float((got[:, :16] - best).norm() / best.norm()) < 0.05
    assert float((weight[:, :16].double() - best).norm() / best.norm()) > 0.1


def test_a_moment_that_is_none_is_refused():
    with pytest.raises(ValueError, match="not positive definite"):
        quantize_linear(torch.randn(2, 32), LinearLayout(2, 32, 4, 16), moment_KK=-torch.eye(32), rounding=GPTQ)


def test_inputs_that_are_all_zero_are_named_as_such(saved, text_file, tmp_path):
    folder = saved("llama")
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"].zero_()
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    recipe = load_recipe("gptq").replace(group_size=16)
    with pytest.raises(ValueError, match=r"model.layers.1.mlp.down_proj: the inputs are zero, or count nothing, throughout the calibration text"):
        quantize(str(folder), tmp_path / "out", recipe, Calibration(str(text_file), 2, 32), "cpu")


def test_channels_that_never_fire_are_no_trouble():
    x = correlated(500, 64)
    x[:, 5] = 0
    stored = quantize_linear(torch.randn(4, 64), LinearLayout(4, 64, 4, 32), moment_KK=x.T @ x, rounding=GPTQ)
    assert torch.isfinite(dequantize(LinearLayout(4, 64, 4, 32), stored)).all()


def test_an_order_of_channels_is_an_order_of_the_moment_too():
    ordered, plain = (LinearLayout(4, 64, 4, 16, salient=16, ordered=flag) for flag in (True, False))
    weight, x = torch.randn(4, 64, generator=torch.Generator().manual_seed(1)), correlated(500, 64)
    order, moment = torch.randperm(64, generator=torch.Generator().manual_seed(2)), x.T @ x / len(x)
    with_order = quantize_linear(weight, ordered, order, moment, GPTQ)
    before = quantize_linear(weight[:, order], plain, moment_KK=moment[order][:, order], rounding=GPTQ)
    assert all(torch.equal(with_order[name], before[name]) for name in before)


def test_act_order_helps_where_late_channels_carry_most():
    """Channels of growing energy: rounded last, the large ones find nothing left that makes up for their error."""
    layout, x = LinearLayout(64, 128, 3, 32), correlated(2000, 128) * torch.logspace(-1, 1, 128)
    moment, weight = x.T @ x / len(x), torch.randn(64, 128, generator=torch.Generator().manual_seed(1))
    plain, ordered = (output_error(weight, layout, x, moment, rounding) for rounding in (GPTQ, ACT_ORDER))
    assert ordered < 0.5 * plain


def test_act_order_keeps_the_layout_plain():
    """The grids are those of rounding to nearest, group by group of consecutive channels, and no order is stored."""
    layout, x = LinearLayout(8, 64, 4, 16, salient=16), correlated(500, 64)
    weight = torch.randn(8, 64, generator=torch.Generator().manual_seed(1))
    ours, nearest = quantize_linear(weight, layout, None, x.T @ x, ACT_ORDER), quantize_linear(weight, layout)
    assert ours.keys() == nearest.keys() and "order" not in ours
    assert torch.equal(ours["scales"], nearest["scales"]) and torch.equal(ours["zeros"], nearest["zeros"])
    assert not torch.equal(ours["qweight"], nearest["qweight"])


@pytest.mark.parametrize(
    "rounding", [NEAREST, GPTQ, ACT_ORDER, Rounding(clipping="awq"), Rounding(clipping="mse"), Rounding(gptq=True, clipping="mse", refinement=2)]
)
def test_layers_rounded_together_are_as_if_alone(rounding):
    layouts, x = [LinearLayout(n, 64, 4, 16, salient=16) for n in (8, 24)], correlated(500, 64)
    weights = [torch.randn(form.out_features, 64, generator=torch.Generator().manual_seed(form.out_features)) for form in layouts]
    together = quantize_stacked(weights, layouts, None, x.T @ x, rounding)
    for weight, layout, ours in zip(weights, layouts, together, strict=True):
        alone = quantize_linear(weight, layout, None, x.T @ x, rounding)
        assert torch.equal(ours["scales"], alone["scales"])
        got, wanted = dequantize(layout, ours), dequantize(layout, alone)
        assert float((got - wanted).norm() / wanted.norm()) < 1e-3


def loss(weight, layout, moment, rounding):
    error = dequantize(layout, quantize_linear(weight, layout, None, moment, rounding)).double() - weight.double()
    return float(((error @ moment.double()) * error).sum())


@pytest.mark.parametrize(("blocks", "salient", "group"), [(1, 0, 32), (1, 16, 48), (4, 4, 16)])
@pytest.mark.parametrize("act_order", [False, True])
def test_refinement_lowers_the_loss(blocks, salient, group, act_order):
    layout, x = LinearLayout(48, 128, 3, group, blocks, salient), correlated(2000, 128)
    moment, weight = x.T @ x / len(x), torch.randn(48, 128, generator=torch.Generator().manual_seed(1))
    found = [loss(weight, layout, moment, Rounding(gptq=True, act_order=act_order, refinement=sweeps)) for sweeps in (0, 1, 3)]
    assert found[1] < 0.95 * found[0] and found[2] <= found[1]


def test_fitted_scales_are_those_of_least_squares():
    """Each row's scales lose least with its codes: (w - C s) M (w - C s) by its normal equations, solved in float64."""
    layout, x = LinearLayout(6, 96, 4, 16, blocks=2, salient=8), correlated(2000, 96).double()
    columns, groups = layout.quantized_columns(), layout.column_groups()
    moment = (x.T @ x / len(x))[columns][:, columns]
    generator = torch.Generator().manual_seed(1)
    weight = torch.randn(6, len(columns), generator=generator, dtype=torch.float64)
    before = torch.full((6, layout.groups), 0.3, dtype=torch.float64)
    steps = torch.round(weight / 0.3).clamp(-7, 7)
    found = _fit_scales(weight, moment, steps, before, layout)
    root = torch.linalg.cholesky(moment).T
    for row in range(6):
        parts = torch.nn.functional.one_hot(groups, layout.groups) * steps[row][:, None]
        wanted = torch.linalg.lstsq(root @ parts, (root @ weight[row])[:, None]).solution[:, 0]
        wanted = torch.where((wanted > 0.15) & (wanted < 0.6), wanted, 0.3)
        assert torch.allclose(found[row], wanted, rtol=1e-3)  # as FP16 holds them


def test_conditional_variances_are_those_of_the_inverse():
    """The diagonal of the factor that GPTQ uses, and by hand: the last channel has none behind it."""
    x = correlated(500, 48)
    moment = x.T @ x / len(x)
    found = conditional_variances(moment)
    assert torch.allclose(found, inverse_factor(moment).diagonal().pow(-2), rtol=1e-12)
    assert float(found[-1]) == pytest.approx(float(moment[-1, -1] + 0.01 * moment.diagonal().mean()), rel=1e-6)


def test_no_single_code_is_better_after_refinement():
    """Coordinate descent ends where no code moved alone lowers the loss (damping included)."""
    layout, x = LinearLayout(4, 32, 3, 16), correlated(500, 32)
    moment, weight = x.T @ x / len(x), torch.randn(4, 32, generator=torch.Generator().manual_seed(1))
    stored = quantize_linear(weight, layout, None, moment, Rounding(gptq=True, refinement=30))
    got, damping = dequantize(layout, stored).double(), 0.01 * moment.diagonal().mean() * torch.eye(32)
    moment = (moment + damping).double()
    lost = lambda w: ((w - weight) @ moment * (w - weight)).sum(1)  # noqa: E731
    steps = stored["scales"].double()[:, layout.column_groups()]
    codes = unpack(stored["qweight"], 3, 32)
    for channel in range(32):
        for step in (-1, 1):
            moved = got.clone()
            moved[:, channel] += step * steps[:, channel]
            allowed = (codes[:, channel] + step >= 0) & (codes[:, channel] + step <= 7)
            assert (lost(moved)[allowed] > lost(got)[allowed] - 1e-4).all()


def test_a_searched_range_loses_less_than_the_whole_one_where_a_weight_stands_out():
    layout, x = LinearLayout(32, 128, 3, 64), correlated(2000, 128)
    weight = torch.randn(32, 128, generator=torch.Generator().manual_seed(1))
    weight[:, ::64] *= 3
    moment = x.T @ x / len(x)
    for gptq in (False, True):
        whole, searched = (loss(weight, layout, moment, Rounding(gptq=gptq, clipping=clipping)) for clipping in ("none", "mse"))
        assert searched < 0.9 * whole


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")
def test_triton_rounds_as_the_loop_in_its_interpreter():
    """In a process of its own, since Triton reads the variable when it is imported."""
    program = """
import torch
from rosaq.rounding.columns import _launch, _loop
torch.manual_seed(0)
for width, outputs, channels, start in ((96, 37, 64, 0), (200, 33, 48, 1), (130, 32, 128, 2)):
    x, weight = torch.randn(500, width, dtype=torch.float64) @ torch.randn(width, width, dtype=torch.float64), torch.randn(width, outputs)
    factor = torch.linalg.cholesky(torch.linalg.inv(x.T @ x / 500 + torch.eye(width)), upper=True).float()
    for rows in (1, channels):
        scale = (torch.rand(rows, outputs) / 10 + 0.1).expand(channels, -1)
        zero = torch.randint(0, 15, (rows, outputs)).float().expand(channels, -1)
        codes, errors = _loop(weight.clone(), factor, start, scale, zero, 15)
        ours = _launch(weight.clone(), factor, start, scale, zero, 15)
        assert len(codes.unique()) == 16 and torch.equal(ours[0], codes), (width, rows)
        assert float((ours[1] - errors).abs().max()) < 1e-5 * float(errors.abs().max()), (width, rows)
"""
    environment = {**os.environ, "TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
