"""From a recipe and what the sites' inputs look like, the changes of basis; and their application to a block."""

from collections.abc import Iterable
from dataclasses import dataclass, field

import torch

from rosaq.architecture import LINEARS, NORMS, SITE_NORM, Architecture
from rosaq.layout import LinearLayout
from rosaq.moments import BlockInputs
from rosaq.recipe import Recipe
from rosaq.rotation import Block, absorb_heads, absorb_inputs, absorb_residual, fold_norms, principal_basis, scale_feed_forward
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
    """

    block: Block
    orders: dict[str, torch.Tensor] = field(default_factory=dict)
    rotations: dict[str, torch.Tensor] = field(default_factory=dict)


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


def prepare_block(
    block: Block, inputs: BlockInputs, recipe: Recipe, architecture: Architecture, residual_basis: torch.Tensor | None, down: LinearLayout
) -> PreparedBlock:
    """Put one block into the recipe's basis.

    Args:
        block: the source's tensors, float32 or float64, on the device to compute on.
        inputs: what `moments.collect` kept of the block.
        recipe: the recipe.
        architecture: the model's sizes.
        residual_basis: (D, D) where the recipe's rotation is "global", else None.
        down: form of W_down, whose rounding AWQ's search looks at.
    """
    device = block[f"{LINEARS['down']}.weight"].device
    gains = {site: block[f"{NORMS[norm]}.weight"].float().abs().cpu() for site, norm in SITE_NORM.items()}
    prepared = PreparedBlock(block if recipe.rotation == "none" else fold_norms(block))
    if recipe.rotation == "global":
        assert residual_basis is not None
        prepared.block = absorb_residual(prepared.block, residual_basis.to(device))
    elif recipe.rotation == "per-layer":
        for site, norm in SITE_NORM.items():
            moment = inputs[site].moment
            assert moment is not None
            basis, _ = principal_basis(moment.to(device))
            prepared.block = absorb_inputs(prepared.block, site, basis)
            prepared.rotations[NORMS[norm]] = basis
    prepared.block = _absorb_heads(prepared.block, inputs, recipe, architecture)
    if recipe.down_scaling == "awq":
        prepared.block = _scale_down(prepared.block, inputs, down)
    if recipe.selection == "magnitude" and recipe.salient:
        for site, gain in gains.items():
            prepared.orders[site] = salient_first(inputs[site].magnitude * gain, recipe.salient)
    return prepared


def _absorb_heads(block: Block, inputs: BlockInputs, recipe: Recipe, a: Architecture) -> Block:
    if recipe.head_rotation == "head-wise":
        moment = inputs["attn_out"].moment
        assert moment is not None
        bases, _ = principal_basis(moment.to(block[f"{LINEARS['o']}.weight"].device))
    elif recipe.salient_per_head:
        bases = salient_first_heads(inputs["attn_out"].magnitude, recipe.salient_per_head, a.heads, a.kv_heads)
    else:
        return block
    return absorb_heads(block, bases, a)


def _scale_down(block: Block, inputs: BlockInputs, layout: LinearLayout) -> Block:
    weight = block[f"{LINEARS['down']}.weight"]
    sample = inputs["mlp_out"].sample
    assert sample is not None
    scale = search_scale(weight, inputs["mlp_out"].magnitude.to(weight), sample.to(weight), lambda candidate: round_to_nearest(candidate, layout))
    return scale_feed_forward(block, scale)
