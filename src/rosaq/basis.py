"""From a recipe and what the sites' inputs look like, the changes of basis; and their application to a block."""

from collections.abc import Iterable
from dataclasses import dataclass, field

import torch

from rosaq.architecture import LINEARS, NORMS, SITE_NORM, Architecture
from rosaq.hadamard import hadamard_transform
from rosaq.layout import LinearLayout
from rosaq.moments import BlockInputs
from rosaq.recipe import DRAWN, Recipe
from rosaq.rotation import (
    Block,
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
from rosaq.rounding.grid import round_to_nearest
from rosaq.rounding.scaling import search_scale
from rosaq.saliency import salient_first, salient_first_heads


@dataclass
class PreparedBlock:
    """A block in the basis that it is rounded in.

    Attributes:
        block: its tensors.
        orders: site -> order of the input channels, salient ones first, where they are gathered at run time.
        rotations: norm name -> basis (D, D) applied at run time.
        transforms: site -> what its inputs were multiplied by, from x as `moments` sees it: a diagonal (K,), a basis
            (K, K), or one per query head (heads, E, E); nothing where they are as they were.
        down_order: order (K,) of the feed-forward channels, applied before the transform of mlp_out, or None.
        down_rotated: the inputs of mlp_out are multiplied by a Hadamard matrix at run time, behind all other changes.
    """

    block: Block
    orders: dict[str, torch.Tensor] = field(default_factory=dict)
    rotations: dict[str, torch.Tensor] = field(default_factory=dict)
    transforms: dict[str, torch.Tensor] = field(default_factory=dict)
    down_order: torch.Tensor | None = None
    down_rotated: bool = False

    def moment(self, site: str, moment_KK: torch.Tensor) -> torch.Tensor:
        """A site's second moment (K, K) as `moments` sees it, in the basis of the block."""
        if site == "mlp_out" and self.down_rotated:
            return hadamard_transform(hadamard_transform(moment_KK).T)
        if site == "mlp_out" and self.down_order is not None:
            moment_KK = moment_KK[self.down_order][:, self.down_order]
        if site not in self.transforms:
            return moment_KK
        transform = self.transforms[site].to(moment_KK)
        if transform.dim() == 1:
            return moment_KK * transform * transform[:, None]
        if transform.dim() == 2:
            return transform.T @ moment_KK @ transform
        heads, size = transform.shape[:2]
        blocks = moment_KK.view(heads, size, heads, size)
        return torch.einsum("pae,paqb,qbf->peqf", transform, blocks, transform).reshape_as(moment_KK)


def residual_moment(blocks: Iterable[BlockInputs]) -> torch.Tensor:
    """The moment (D, D) that one basis for the whole residual stream is taken from.

    The mean over all attn_in and mlp_in sites, each divided by its trace so that none counts for more than another.
    """
    total, sites = None, 0
    for inputs in blocks:
        for site in SITE_NORM:
            moment = inputs[site].moment
            assert moment is not None
            share = moment.double() / moment.double().trace()
            total = share if total is None else total + share
            sites += 1
    assert total is not None
    return total / sites


def draw_bases(recipe: Recipe, architecture: Architecture) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """What the recipe draws by its seed: residual basis (D, D), head bases (blocks, H, E, E), float64; None what it does not.

    A learned basis starts from the "hadamard" one of the same seed.
    """
    a, generator = architecture, torch.Generator().manual_seed(recipe.seed)
    kinds = ["hadamard" if kind == "learned" else kind for kind in (recipe.rotation, recipe.head_rotation)]
    residual = random_bases(kinds[0], 1, a.hidden, generator)[0] if kinds[0] in DRAWN else None
    heads = random_bases(kinds[1], a.layers * a.kv_heads, a.head_size, generator) if kinds[1] in DRAWN else None
    return residual, None if heads is None else heads.view(a.layers, a.kv_heads, a.head_size, a.head_size)


def prepare_block(
    block: Block,
    inputs: BlockInputs,
    recipe: Recipe,
    architecture: Architecture,
    residual_basis: torch.Tensor | None,
    down: LinearLayout,
    head_bases: torch.Tensor | None = None,
) -> PreparedBlock:
    """Put one block into the recipe's basis.

    Args:
        block: the source's tensors, float32 or float64, on the device to compute on.
        inputs: what `moments.collect` kept of the block.
        recipe: the recipe.
        architecture: the model's sizes.
        residual_basis: (D, D) where one is absorbed by the whole residual stream, else None.
        down: form of W_down, whose rounding AWQ's search looks at.
        head_bases: (H, E, E) of this block where they are drawn or learned, else None.
    """
    device = block[f"{LINEARS['down']}.weight"].device
    gains = {site: block[f"{NORMS[norm]}.weight"].float() for site, norm in SITE_NORM.items()}
    prepared = PreparedBlock(block if recipe.rotation == "none" else fold_norms(block))
    if recipe.rotation == "none":
        prepared.transforms.update(gains)
    elif recipe.rotation == "per-layer":
        _rotate_per_layer(prepared, inputs, device)
    else:
        assert residual_basis is not None
        prepared.block = absorb_residual(prepared.block, residual_basis.to(device))
        prepared.transforms.update({site: residual_basis for site in SITE_NORM})
    _absorb_heads(prepared, inputs, recipe, architecture, head_bases)
    _prepare_down(prepared, inputs, recipe, down)
    if recipe.selection == "magnitude" and recipe.salient:
        for site, gain in gains.items():
            prepared.orders[site] = salient_first(inputs[site].magnitude * gain.abs().cpu(), recipe.salient)
    return prepared


def _rotate_per_layer(prepared: PreparedBlock, inputs: BlockInputs, device: torch.device) -> None:
    for site, norm in SITE_NORM.items():
        moment = inputs[site].moment
        assert moment is not None
        basis, _ = principal_basis(moment.to(device))
        prepared.block = absorb_inputs(prepared.block, site, basis)
        prepared.rotations[NORMS[norm]] = prepared.transforms[site] = basis


def _absorb_heads(prepared: PreparedBlock, inputs: BlockInputs, recipe: Recipe, a: Architecture, given: torch.Tensor | None) -> None:
    if given is not None:
        bases = given
    elif recipe.head_rotation == "head-wise":
        moment = inputs["attn_out"].moment
        assert moment is not None
        bases, _ = principal_basis(moment.to(prepared.block[f"{LINEARS['o']}.weight"].device))
    elif recipe.salient_per_head:
        bases = salient_first_heads(inputs["attn_out"].magnitude, recipe.salient_per_head, a.heads, a.kv_heads)
    else:
        return
    prepared.block = absorb_heads(prepared.block, bases, a)
    prepared.transforms["attn_out"] = bases.repeat_interleave(a.heads // a.kv_heads, 0)


def _prepare_down(prepared: PreparedBlock, inputs: BlockInputs, recipe: Recipe, layout: LinearLayout) -> None:
    """Order the feed-forward channels, salient ones first, then scale them by AWQ's search."""
    weight = prepared.block[f"{LINEARS['down']}.weight"]
    magnitude, sample = inputs["mlp_out"].magnitude.to(weight), inputs["mlp_out"].sample
    assert sample is not None
    if recipe.salient_down:
        prepared.down_order = salient_first(magnitude, recipe.salient_down)
        prepared.block = permute_feed_forward(prepared.block, prepared.down_order)
        weight, magnitude, sample = weight[:, prepared.down_order], magnitude[prepared.down_order], sample[:, prepared.down_order.cpu()]
    if recipe.down_scaling == "awq":
        scale = search_scale(weight, magnitude, sample.to(weight), lambda candidate: _round_quantized(candidate, layout))
        prepared.block = scale_feed_forward(prepared.block, scale)
        prepared.transforms["mlp_out"] = 1 / scale
    if recipe.down_rotation == "hadamard":
        prepared.block, prepared.down_rotated = rotate_down(prepared.block), True


def _round_quantized(weight: torch.Tensor, layout: LinearLayout) -> torch.Tensor:
    """A weight with its quantized channels rounded and its salient ones as they are."""
    columns = layout.quantized_columns().to(weight.device)
    rounded = weight.clone()
    rounded[:, columns] = round_to_nearest(weight[:, columns], layout)
    return rounded
