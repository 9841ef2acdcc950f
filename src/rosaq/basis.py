"""From a recipe and what the sites' inputs look like, the changes of basis; and their application to a block."""

from collections.abc import Iterable
from dataclasses import dataclass, field, replace

import torch

from rosaq.architecture import LINEARS, NORMS, SITE_NORM, Architecture
from rosaq.layout import LinearLayout
from rosaq.moments import BlockInputs
from rosaq.recipe import Recipe
from rosaq.rotation import (
    Block,
    absorb_heads,
    absorb_inputs,
    absorb_residual,
    fold_norms,
    permute_feed_forward,
    principal_basis,
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
    """

    block: Block
    orders: dict[str, torch.Tensor] = field(default_factory=dict)
    rotations: dict[str, torch.Tensor] = field(default_factory=dict)
    transforms: dict[str, torch.Tensor] = field(default_factory=dict)
    down_order: torch.Tensor | None = None

    def moment(self, site: str, moment_KK: torch.Tensor) -> torch.Tensor:
        """A site's second moment (K, K) as `moments` sees it, in the basis of the block."""
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


class ResidualSum:
    """The moment (D, D) that one basis for the whole residual stream is taken from, summed block by block in float64.

    The mean over all attn_in and mlp_in sites, each divided by its trace so that none counts for more than another.

    Attributes:
        total: sum so far, None before the first block.
        sites: how many are in it.
    """

    def __init__(self, total: torch.Tensor | None = None, sites: int = 0) -> None:
        """Begin with nothing, or go on from a sum."""
        self.total, self.sites = total, sites

    def add(self, inputs: BlockInputs) -> None:
        """Take one block's sites in."""
        for site in SITE_NORM:
            moment = inputs[site].moment
            assert moment is not None
            share = moment.double() / moment.double().trace()
            self.total = share if self.total is None else self.total + share
            self.sites += 1

    def moment(self) -> torch.Tensor:
        """The mean (D, D)."""
        assert self.total is not None
        return self.total / self.sites


def residual_moment(blocks: Iterable[BlockInputs]) -> torch.Tensor:
    """The moment (D, D) of `ResidualSum` over all blocks."""
    total = ResidualSum()
    for inputs in blocks:
        total.add(inputs)
    return total.moment()


def kept_inputs(inputs: BlockInputs, recipe: Recipe) -> BlockInputs:
    """What rounding still needs of a block's inputs: moments of the residual sites only where each has its own basis."""
    if recipe.rotation == "per-layer":
        return inputs
    return {site: replace(kept, moment=None) if site in SITE_NORM else kept for site, kept in inputs.items()}


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
    gains = {site: block[f"{NORMS[norm]}.weight"].float() for site, norm in SITE_NORM.items()}
    prepared = PreparedBlock(block if recipe.rotation == "none" else fold_norms(block))
    if recipe.rotation == "none":
        prepared.transforms.update(gains)
    elif recipe.rotation == "global":
        assert residual_basis is not None
        prepared.block = absorb_residual(prepared.block, residual_basis.to(device))
        prepared.transforms.update({site: residual_basis for site in SITE_NORM})
    else:
        _rotate_per_layer(prepared, inputs, device)
    _absorb_heads(prepared, inputs, recipe, architecture)
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


def _absorb_heads(prepared: PreparedBlock, inputs: BlockInputs, recipe: Recipe, a: Architecture) -> None:
    if recipe.head_rotation == "head-wise":
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


def _round_quantized(weight: torch.Tensor, layout: LinearLayout) -> torch.Tensor:
    """A weight with its quantized channels rounded and its salient ones as they are."""
    columns = layout.quantized_columns().to(weight.device)
    rounded = weight.clone()
    rounded[:, columns] = round_to_nearest(weight[:, columns], layout)
    return rounded
