"""Every recipe's change of basis leaves the model as it was before anything is rounded, and does what it is named for."""

import pytest
import torch

from conftest import random_model
from rosaq import load_recipe, measure, open_source, shipped_recipes
from rosaq.basis import Bases, draw_bases, prepare_block, residual_basis
from rosaq.hadamard import hadamard_transform
from rosaq.moments import collect_moments
from rosaq.plan import make_plan

IDS = torch.arange(3, 43).view(2, 20)
WINDOWS = torch.arange(160).remainder(90).view(5, 32)
SCALED = {"rosaq-paper, scaled": "rosaq-paper", "mixed, scaled": "mixed"}  # AWQ's scales beside a rotation, and beside a gather


def small(name):
    recipe = load_recipe(SCALED.get(name, name))
    sizes = dict(salient=16, salient_per_head=4) if recipe.salient else {}
    scaling = dict(scaling="awq") if name in SCALED else {}
    return recipe.replace(group_size=16, **sizes, **scaling, salient_down=16 if recipe.salient_down else 0)


def prepared_blocks(source, recipe, dtype=torch.float64):
    """The basis of the residual stream, all blocks in the recipe's basis, and the moments that they were made from."""
    statistics = measure(source, WINDOWS, "cpu")
    moments = list(collect_moments(source, WINDOWS, "cpu", torch.float32))
    layouts = make_plan(recipe, source.architecture).blocks[0]
    residual, heads = draw_bases(recipe, source.architecture)
    basis = residual_basis(statistics.residual_moment(), recipe) if recipe.rotation == "global" else residual
    blocks = []
    for index, inputs in enumerate(statistics.inputs):
        block = {name: tensor.to(dtype) for name, tensor in source.block(index).items()}
        bases = Bases(basis, None if heads is None else heads[index])
        blocks.append(prepare_block(block, inputs, recipe, source.architecture, bases, layouts, moments[index]))
    return basis, blocks, moments


@pytest.mark.parametrize("name", [*shipped_recipes(), *SCALED])
def test_before_rounding_every_recipe_is_exact(name, family, saved):
    source, model = open_source(str(saved(family))), random_model(family).double()
    with torch.inference_mode():
        wanted = model(IDS).logits
    basis, blocks, _ = prepared_blocks(source, small(name))
    if basis is not None:
        head = (model.lm_head.weight * model.model.norm.weight) @ basis
        model.model.embed_tokens.weight = torch.nn.Parameter(model.model.embed_tokens.weight @ basis)
        model.lm_head.weight = torch.nn.Parameter(head)
        model.model.norm.weight = torch.nn.Parameter(torch.ones_like(model.model.norm.weight))
    for layer, prepared in zip(model.model.layers, blocks, strict=True):
        layer.load_state_dict(prepared.block)
        if prepared.down_rotated:
            layer.mlp.down_proj.register_forward_pre_hook(lambda _, x: (hadamard_transform(x[0]),))
        for module, rotation in prepared.rotations.items():
            if "norm" in module:
                layer.get_submodule(module).register_forward_hook(lambda _, x, y, rotation=rotation: y @ rotation)
            else:
                layer.get_submodule(module).register_forward_pre_hook(lambda _, x, rotation=rotation: (x[0] @ rotation.double(),))
    with torch.inference_mode():
        error = (model(IDS).logits - wanted).norm() / wanted.norm()
    assert float(error) < 1e-6


def test_awq_scales_all_four_sites(saved):
    """Outlier channels at every site: each weight and what absorbs its scale are changed."""
    source = open_source(str(saved("llama")))
    _, blocks, _ = prepared_blocks(source, small("awq"))
    changed = {
        name
        for index, prepared in enumerate(blocks)
        for name, tensor in prepared.block.items()
        if not torch.equal(tensor, source.block(index)[name].double())
    }
    assert {"input_layernorm.weight", "self_attn.v_proj.weight", "post_attention_layernorm.weight", "mlp.up_proj.weight"} <= changed
    assert {"self_attn.q_proj.weight", "self_attn.o_proj.weight", "mlp.gate_proj.weight", "mlp.down_proj.weight"} <= changed


def test_query_heads_of_a_group_share_their_scale(saved):
    source = open_source(str(saved("llama")))
    _, blocks, _ = prepared_blocks(source, small("awq"))
    ratio = blocks[0].block["self_attn.o_proj.weight"] / source.block(0)["self_attn.o_proj.weight"].double()
    heads = ratio.view(-1, 2, 2, 16)
    assert torch.allclose(heads[:, :, 0], heads[:, :, 1]) and float(heads.std()) > 1e-3


def energy(name, saved, site, seed=0):
    """Share of a site's energy in its salient channels, the mean over blocks."""
    source = open_source(str(saved("llama")))
    recipe = small(name).replace(seed=seed)
    layout = make_plan(recipe, source.architecture).blocks[0][{"attn_in": "q", "attn_out": "o"}[site]]
    _, blocks, moments = prepared_blocks(source, recipe)
    shares = []
    for prepared, moment in zip(blocks, moments, strict=True):
        diagonal = prepared.moment(site, moment[site]).diagonal()
        shares.append(float(diagonal[layout.salient_columns()].sum() / diagonal.sum()))
    return sum(shares) / len(shares)


@pytest.mark.parametrize("site", ["attn_in", "attn_out"])
def test_top_channels_hold_the_energy(site, saved):
    """Table 2: Top above Top & Bottom, above Random, above Bottom, which is next to nothing."""
    names = ("rosaq-paper", "rosaq-top-bottom", "rosaq-random", "rosaq-bottom")
    top, both, drawn, bottom = (energy(name, saved, site, seed=1) for name in names)
    assert top > both > drawn > bottom
    assert bottom < 0.25 * top


def test_head_bases_hold_the_energy_in_order(saved):
    """Table 3: a basis across heads holds at least what head-wise bases do, these more than one for all, and than none."""
    names = ("rosaq-heads-concatenated", "rosaq-paper", "rosaq-heads-shared", "rosaq-heads-none")
    concatenated, head_wise, shared, none = (energy(name, saved, "attn_out") for name in names)
    assert concatenated > head_wise > max(shared, none)


def test_w_down_with_its_salient_channels_first_is_exact(saved):
    """Gate and up absorb the order."""
    source, recipe = open_source(str(saved("llama", intermediate_size=96))), small("rosaq-int4").replace(salient_down=32)
    x = torch.randn(5, 48, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    basis, blocks, _ = prepared_blocks(source, recipe)
    for index, prepared in enumerate(blocks):
        gain, original = source.block(index)["post_attention_layernorm.weight"].double(), source.block(index)

        def feed_forward(x, block, part="mlp."):
            gate, up, down = (block[f"{part}{name}_proj.weight"].double() for name in ("gate", "up", "down"))
            return (torch.nn.functional.silu(x @ gate.T) * (x @ up.T)) @ down.T

        assert prepared.down_order.sort().values.tolist() == list(range(96)) and prepared.down_order.tolist() != list(range(96))
        torch.testing.assert_close(feed_forward(x @ basis, prepared.block), feed_forward(x * gain, original) @ basis)
