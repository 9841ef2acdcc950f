"""AWQ's two searches: they lose less of the output than rounding to nearest, on inputs that give them something to find."""

import pytest
import torch
from safetensors.torch import load_file

from rosaq import load_recipe, measure, open_source
from rosaq.kernels.reference import dequantize
from rosaq.layout import LinearLayout
from rosaq.pipeline import quantize
from rosaq.rounding.clipping import SHARES, fit_clipped_grid, group_moments
from rosaq.rounding.grid import fit_grid, grouped, round_to_nearest
from rosaq.rounding.linear import Rounding, quantize_linear
from rosaq.rounding.scaling import moment_loss, sample_loss, search_scale


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def outlier_inputs(tokens, width):
    """A few channels thirty times as large as the others."""
    x = normal(tokens, width, seed=1)
    x[:, :: width // 4] *= 30
    return x


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_scaling_loses_less_than_half_where_channels_stand_out(bits):
    layout, weight, x = LinearLayout(32, 128, bits, 32), normal(32, 128), outlier_inputs(500, 128)
    loss = moment_loss(x.T @ x / len(x))
    scale = search_scale(weight, x.abs().mean(0), loss, lambda w: round_to_nearest(w, layout))
    scaled = loss(round_to_nearest(weight * scale, layout) / scale - weight)
    assert scaled < 0.5 * loss(round_to_nearest(weight, layout) - weight)


def test_scaling_leaves_equal_channels_as_they_are():
    layout, weight = LinearLayout(8, 64, 4, 32), normal(8, 64)
    scale = search_scale(weight, torch.full((64,), 0.7), moment_loss(torch.eye(64)), lambda w: round_to_nearest(w, layout))
    assert torch.allclose(scale, torch.ones(64))


def test_scaling_is_never_worse_than_none():
    layout, weight, x = LinearLayout(8, 64, 3, 32), normal(8, 64), normal(200, 64, seed=1)
    loss = moment_loss(x.T @ x)
    scale = search_scale(weight, x.abs().mean(0), loss, lambda w: round_to_nearest(w, layout))
    assert loss(round_to_nearest(weight * scale, layout) / scale - weight) <= loss(round_to_nearest(weight, layout) - weight)


def test_a_moment_and_its_sample_lose_the_same():
    x, error = normal(50, 16, seed=1).double(), normal(8, 16).double()
    assert moment_loss(x.T @ x)(error) == pytest.approx(sample_loss(x)(error))


def test_clipping_loses_less_where_groups_have_a_large_weight():
    """One weight in each group far from the rest, on a channel that hardly fires: the grid is better without it."""
    layout, weight, x = LinearLayout(16, 128, 3, 32), normal(16, 128), normal(500, 128, seed=1)
    weight[:, ::32], x[:, ::32] = 4.0, 0.01 * x[:, ::32]
    moment = x.T @ x / len(x)
    errors = [dequantize(layout, quantize_linear(weight, layout, None, moment, Rounding(clipping=how))) - weight for how in ("none", "awq")]
    nearest, clipped = (moment_loss(moment)(error) for error in errors)
    assert clipped < 0.5 * nearest


def test_clipping_is_never_worse_in_any_group():
    layout, weight, x = LinearLayout(16, 96, 3, 32), normal(16, 96), normal(500, 96, seed=1)
    groups, moments = grouped(weight, layout), group_moments(x.T @ x, layout)

    def losses(scale, zero):
        codes = torch.round(groups / scale[..., None] + zero[..., None]).clamp(0, 7)
        error = (codes - zero[..., None]) * scale[..., None] - groups
        return torch.einsum("ngc,gcd,ngd->ng", error, moments, error)

    plain, clipped = losses(*fit_grid(groups, 3)), losses(*fit_clipped_grid(groups, moments, 3))
    assert bool((clipped <= plain * (1 + 1e-5)).all()) and float(clipped.sum()) < 0.99 * float(plain.sum())
    shares = fit_clipped_grid(groups, moments, 3)[0] / fit_grid(groups, 3)[0]
    assert min(SHARES) - 0.2 < float(shares.min()) < 1


def test_group_moments_are_the_diagonal_blocks_short_groups_filled_up():
    layout = LinearLayout(2, 2 * 24, 4, 16, blocks=2, salient=4)  # per block 20 channels: a group of 16, one of 4
    moment = torch.arange(40.0 * 40).view(40, 40)
    blocks = group_moments(moment, layout)
    assert blocks.shape == (4, 16, 16)
    assert torch.equal(blocks[2], moment[20:36, 20:36])
    assert torch.equal(blocks[3][:4, :4], moment[36:, 36:]) and float(blocks[3].sum()) == float(moment[36:, 36:].sum())


def test_gptq_takes_clipped_grids_too():
    layout, weight, x = LinearLayout(16, 64, 3, 32), normal(16, 64), normal(500, 64, seed=1) @ normal(64, 64, seed=2)
    weight[:, ::32], x[:, ::32] = 4.0, 0.01 * x[:, ::32]
    moment = x.T @ x / len(x)
    errors = [
        moment_loss(moment)(dequantize(layout, quantize_linear(weight, layout, None, moment, Rounding(True, act_order, "awq"))) - weight)
        for act_order in (False, True)
    ]
    plain = moment_loss(moment)(dequantize(layout, quantize_linear(weight, layout, None, moment, Rounding(True))) - weight)
    assert max(errors) < plain


def test_q_and_k_are_not_clipped(saved, tmp_path):
    source = open_source(str(saved("llama")))
    recipe = load_recipe("awq").replace(group_size=16, scaling="none", down_scaling="none")
    windows = torch.arange(160).remainder(90).view(5, 32)
    statistics, stored = measure(source, windows, "cpu"), {}
    for clipping in ("none", "awq"):
        quantize(source, tmp_path / clipping, recipe.replace(clipping=clipping), statistics, "cpu")
        stored[clipping] = load_file(tmp_path / clipping / "model.safetensors")
    same = {name for name, tensor in stored["awq"].items() if torch.equal(tensor, stored["none"][name])}
    for layer in range(2):
        for role, unclipped in (("q", True), ("k", True), ("v", False), ("o", False)):
            assert (f"model.layers.{layer}.self_attn.{role}_proj.scales" in same) == unclipped
        assert not {f"model.layers.{layer}.mlp.{role}_proj.scales" for role in ("gate", "up", "down")} & same
