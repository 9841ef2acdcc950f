"""Every change of basis leaves the model's function as it was; PCA on a case worked by hand."""

import copy

import pytest
import torch

from conftest import random_model
from rosaq.architecture import LINEARS, SITES, Architecture
from rosaq.basis import draw_bases
from rosaq.hadamard import hadamard_transform, has_hadamard
from rosaq.recipe import Recipe
from rosaq.rotation import (
    absorb_heads,
    absorb_inputs,
    absorb_residual,
    fold_norms,
    permute_feed_forward,
    principal_basis,
    random_bases,
    rotate_down,
    scale_feed_forward,
)

IDS = torch.arange(3, 43).view(2, 20)
TOLERANCE = 1e-6  # relative, of the logits; transformers' RMSNorm computes in float32 even for float64 weights


def orthogonal(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.linalg.qr(torch.randn(*shape, generator=generator, dtype=torch.float64))[0]


def change_blocks(model, change):
    """A copy of a float64 model with `change` applied to each block's tensors."""
    changed = copy.deepcopy(model)
    for layer in changed.model.layers:
        layer.load_state_dict(change({name: tensor.clone() for name, tensor in layer.state_dict().items()}))
    return changed


def rotate_all(model, basis, change=lambda block: block):
    """Norms folded and the residual stream in `basis`, lm_head untied; `change` is applied to the blocks after."""
    rotated = change_blocks(model, lambda block: change(absorb_residual(fold_norms(block), basis)))
    embedding, gain = model.model.embed_tokens.weight, model.model.norm.weight
    head = (model.lm_head.weight * gain) @ basis
    rotated.model.embed_tokens.weight = torch.nn.Parameter(embedding @ basis)
    rotated.lm_head.weight = torch.nn.Parameter(head)
    rotated.model.norm.weight = torch.nn.Parameter(torch.ones_like(gain))
    return rotated


def relative_error(model, changed):
    with torch.inference_mode():
        wanted = model(IDS).logits
        return float((changed(IDS).logits - wanted).norm() / wanted.norm())


@pytest.fixture
def model(family):
    return random_model(family).double()


def test_folding_norms_is_exact(model):
    changed = change_blocks(model, fold_norms)
    assert all(float(layer.input_layernorm.weight.std()) == 0 for layer in changed.model.layers)
    assert relative_error(model, changed) < TOLERANCE


def test_residual_basis_is_exact(model):
    changed = rotate_all(model, orthogonal(48, 48))
    assert float((changed.model.embed_tokens.weight - model.model.embed_tokens.weight).norm()) > 1
    assert relative_error(model, changed) < TOLERANCE


def test_head_bases_are_exact(model):
    a = Architecture.of(model.config)
    bases = orthogonal(a.kv_heads, a.head_size, a.head_size)
    assert relative_error(model, change_blocks(model, lambda block: absorb_heads(block, bases, a))) < TOLERANCE


@pytest.mark.parametrize("kind", ["hadamard", "random"])
def test_drawn_bases_are_exact(model, kind):
    a = Architecture.of(model.config)
    recipe = Recipe("x", rotation=kind, head_rotation=kind, salient=0, salient_per_head=0, seed=5)
    residual, heads = draw_bases(recipe, a)
    rotated = rotate_all(model, residual)
    for layer, bases in zip(rotated.model.layers, heads, strict=True):
        layer.load_state_dict(absorb_heads(dict(layer.state_dict()), bases, a))
    assert float((rotated.model.layers[0].self_attn.o_proj.weight - model.model.layers[0].self_attn.o_proj.weight).norm()) > 1
    assert relative_error(model, rotated) < TOLERANCE


@pytest.mark.parametrize("width", [80, 96, 112])
def test_online_hadamard_product_is_exact(family, width):
    model = random_model(family, intermediate_size=width).double()
    changed = change_blocks(model, rotate_down)
    assert relative_error(model, changed) > 0.1
    for layer in changed.model.layers:
        layer.mlp.down_proj.register_forward_pre_hook(lambda _, x: (hadamard_transform(x[0]),))
    assert relative_error(model, changed) < TOLERANCE


def test_feed_forward_scale_is_exact(model):
    scale = torch.linspace(0.1, 9, 80, dtype=torch.float64)
    assert relative_error(model, change_blocks(model, lambda block: scale_feed_forward(block, scale))) < TOLERANCE


def test_feed_forward_order_is_exact(model):
    order = torch.randperm(80, generator=torch.Generator().manual_seed(1))
    assert relative_error(model, change_blocks(model, lambda block: permute_feed_forward(block, order))) < TOLERANCE


def test_site_basis_applied_at_run_time_is_exact(model):
    bases = {site: orthogonal(48, 48, seed=seed) for seed, site in enumerate(("attn_in", "mlp_in"))}
    changed = change_blocks(model, lambda block: absorb_inputs(absorb_inputs(block, "attn_in", bases["attn_in"]), "mlp_in", bases["mlp_in"]))
    for layer in changed.model.layers:
        for site, basis in bases.items():
            for role in SITES[site]:
                layer.get_submodule(LINEARS[role]).register_forward_pre_hook(lambda _, x, basis=basis: (x[0] @ basis,))
    assert relative_error(model, changed) < TOLERANCE


def test_everything_together_is_exact(model):
    a = Architecture.of(model.config)
    bases = orthogonal(a.kv_heads, a.head_size, a.head_size, seed=3)
    scale, order = torch.linspace(0.1, 9, 80, dtype=torch.float64), torch.randperm(80, generator=torch.Generator().manual_seed(1))

    def change(block):
        return permute_feed_forward(scale_feed_forward(absorb_heads(block, bases, a), scale), order)

    assert relative_error(model, rotate_all(model, orthogonal(48, 48, seed=4), change)) < TOLERANCE


def test_a_wrong_rotation_is_seen(model):
    basis = orthogonal(48, 48)
    basis[:, 0] *= 1.001  # no longer orthogonal, by a thousandth
    assert relative_error(model, rotate_all(model, basis)) > 10 * TOLERANCE


def test_principal_basis_by_hand():
    # x is (3, 3) or (1, -1), half the time each: the mean of x^T x is [[5, 4], [4, 5]], with eigenvectors
    # (1, 1) / sqrt 2 for 9 and (1, -1) / sqrt 2 for 1.
    x = torch.tensor([[3.0, 3.0], [1.0, -1.0]])
    basis, values = principal_basis(x.T @ x / 2)
    assert torch.allclose(values, torch.tensor([9.0, 1.0], dtype=torch.float64))
    assert torch.allclose(basis.abs(), torch.full((2, 2), 0.5**0.5, dtype=torch.float64))
    assert float(basis[0, 0] * basis[1, 0]) > 0 > float(basis[0, 1] * basis[1, 1])


def test_principal_basis_is_sorted_orthogonal_and_free_of_sign():
    x = torch.randn(500, 12, generator=torch.Generator().manual_seed(0)).double() @ torch.diag(torch.arange(12.0).double())
    basis, values = principal_basis(x.T @ x)
    assert torch.allclose(basis.T @ basis, torch.eye(12, dtype=torch.float64), atol=1e-12)
    assert bool((values.diff() <= 0).all())
    flipped, _ = principal_basis((-x).T @ (-x))
    assert torch.equal(basis, flipped)
    rotation = torch.diag(torch.tensor([-1.0] * 6 + [1.0] * 6).double())  # the same data with six axes mirrored
    mirrored, _ = principal_basis((x @ rotation).T @ (x @ rotation))
    assert torch.allclose((rotation @ mirrored).abs(), basis.abs(), atol=1e-9)
    assert bool((basis.gather(0, basis.abs().argmax(0, keepdim=True)) > 0).all())


def test_principal_basis_takes_batches_of_heads():
    moments = torch.stack([torch.diag(torch.tensor([1.0, 5.0, 3.0])), torch.diag(torch.tensor([7.0, 2.0, 4.0]))])
    bases, values = principal_basis(moments)
    assert torch.equal(values, torch.tensor([[5.0, 3.0, 1.0], [7.0, 4.0, 2.0]], dtype=torch.float64))
    assert bases[0].argmax(0).tolist() == [1, 2, 0] and bases[1].argmax(0).tolist() == [0, 2, 1]


@pytest.mark.parametrize("kind", ["hadamard", "random"])
@pytest.mark.parametrize("size", [10, 16, 90, 576])
def test_random_bases_are_orthogonal_and_seeded(kind, size):
    def draw(seed):
        return random_bases(kind, 2, size, torch.Generator().manual_seed(seed))

    bases = draw(0)
    for basis in bases:
        assert torch.allclose(basis.T @ basis, torch.eye(size, dtype=torch.float64), atol=1e-12)
    assert torch.equal(bases, draw(0)) and not torch.equal(bases, draw(1)) and not torch.equal(bases[0], bases[1])
    if kind == "hadamard" and has_hadamard(size):
        assert torch.allclose(bases.abs(), torch.full_like(bases, size**-0.5))


def test_a_random_hadamard_basis_spreads_a_spike_and_depends_on_its_seed():
    """Signs behind the product would leave |x R| the same for every seed."""
    x = torch.tensor([3.0, 1.0] + [0.0] * 46, dtype=torch.float64)
    turned = [x @ random_bases("hadamard", 1, 48, torch.Generator().manual_seed(seed))[0] for seed in range(8)]
    assert all(float(y.abs().max()) < 4.01 / 48**0.5 for y in turned)
    assert len({tuple((y.abs() * 48**0.5).round().tolist()) for y in turned}) == 2  # 3 + 1 and 3 - 1 change places
