"""From a recipe and what the sites' inputs look like, the changes of basis; and their application to a block."""

from collections.abc import Iterable
from dataclasses import dataclass, field, replace

import torch

from rosaq.architecture import LINEARS, NORMS, SITE_NORM, SITES, Architecture
from rosaq.hadamard import hadamard_transform
from rosaq.layout import LinearLayout
from rosaq.moments import BlockInputs, SiteInputs
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
    scale_residual_inputs,
    scale_values,
)
from rosaq.rounding.grid import round_to_nearest
from rosaq.rounding.scaling import moment_loss, sample_loss, search_scale
from rosaq.saliency import salient_first, salient_first_heads, spectrum_order

Moments = dict[str, torch.Tensor]


@dataclass
class PreparedBlock:
    """A block in the basis that it is rounded in.

    Attributes:
        block: its tensors.
        orders: site -> order of the input channels, salient ones first, where they are gathered at run time.
        rotations: norm or linear layer -> basis (K, K) applied at run time, after the norm or before the layer.
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

    def magnitude(self, site: str, inputs: SiteInputs, moment_KK: torch.Tensor | None) -> torch.Tensor:
        """How large a site's input channels are (K,), in the basis of the block.

        The mean |x|; behind a rotation, where it is not known, the root of the mean square.

        Args:
            site: of the block.
            inputs: what calibration kept of it.
            moment_KK: its second moment in the basis of the block; only a rotated site needs it.
        """
        transform, magnitude = self.transforms.get(site), inputs.magnitude
        if transform is not None and transform.dim() > 1:
            assert moment_KK is not None
            return moment_KK.diagonal().clamp_min(0).sqrt()
        if site == "mlp_out" and self.down_order is not None:
            magnitude = magnitude[self.down_order.to(magnitude.device)]
        return magnitude if transform is None else magnitude * transform.to(magnitude).abs()

    def scaled(self, site: str, scale_K: torch.Tensor) -> None:
        """Take note that the inputs of a site are divided by a scale from here on."""
        transform = self.transforms.get(site)
        if transform is None:
            self.transforms[site] = 1 / scale_K
        else:
            per_column = scale_K.view(transform.shape[0], 1, -1) if transform.dim() == 3 else scale_K
            self.transforms[site] = transform.to(scale_K.device) / per_column


@dataclass(frozen=True)
class Bases:
    """The bases of a block that are not found from its own inputs.

    Attributes:
        residual: (D, D) where one is absorbed by the whole residual stream, else None.
        heads: (H, E, E) where the recipe draws or learns them, else None.
    """

    residual: torch.Tensor | None = None
    heads: torch.Tensor | None = None


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


def draw_bases(recipe: Recipe, architecture: Architecture) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """What the recipe draws by its seed: residual basis (D, D), head bases (blocks, H, E, E), float64; None what it does not.

    A learned basis starts from the "hadamard" one of the same seed.
    """
    a, generator = architecture, torch.Generator().manual_seed(recipe.seed)
    kinds = ["hadamard" if kind == "learned" else kind for kind in (recipe.rotation, recipe.head_rotation)]
    residual = random_bases(kinds[0], 1, a.hidden, generator)[0] if kinds[0] in DRAWN else None
    heads = random_bases(kinds[1], a.layers * a.kv_heads, a.head_size, generator) if kinds[1] in DRAWN else None
    return residual, None if heads is None else heads.view(a.layers, a.kv_heads, a.head_size, a.head_size)


def residual_basis(moment: torch.Tensor, recipe: Recipe) -> torch.Tensor:
    """The basis (D, D) of the whole residual stream, by its moment as `ResidualSum` has it, for the rotation "global"."""
    return _principal_axes(moment, recipe, recipe.salient)


def _principal_axes(moment: torch.Tensor, recipe: Recipe, salient: int) -> torch.Tensor:
    """Principal axes (..., D, D), the salient ones first: by eigenvalue, or as another selection has them."""
    basis, _ = principal_basis(moment)
    return basis[..., spectrum_order(basis.shape[-1], salient, recipe.selection, recipe.seed)]


def prepare_block(
    block: Block,
    inputs: BlockInputs,
    recipe: Recipe,
    architecture: Architecture,
    bases: Bases,
    layouts: dict[str, LinearLayout],
    moments: Moments | None = None,
) -> PreparedBlock:
    """Put one block into the recipe's basis.

    Args:
        block: the source's tensors, float32 or float64, on the device to compute on.
        inputs: what `moments.collect` kept of the block.
        recipe: the recipe.
        architecture: the model's sizes.
        bases: those of the whole model that this block absorbs.
        layouts: form of each linear layer by role, for searches that look at its rounding.
        moments: site -> whole second moment (K, K), where the recipe needs them.
    """
    device, moments = block[f"{LINEARS['down']}.weight"].device, moments or {}
    gains = {site: block[f"{NORMS[norm]}.weight"].float() for site, norm in SITE_NORM.items()}
    prepared = PreparedBlock(block if recipe.rotation == "none" else fold_norms(block))
    if recipe.rotation == "none":
        prepared.transforms.update(gains)
    elif recipe.rotation == "per-layer":
        _rotate_per_layer(prepared, inputs, recipe, device)
    else:
        assert bases.residual is not None
        prepared.block = absorb_residual(prepared.block, bases.residual.to(device))
        prepared.transforms.update({site: bases.residual for site in SITE_NORM})
    if recipe.head_rotation == "concatenated":
        _rotate_concatenated(prepared, moments, recipe, architecture)
    else:
        _absorb_heads(prepared, inputs, recipe, architecture, bases.heads, layouts["o"].salient)
    for site, gain in gains.items():
        layout = layouts[SITES[site][0]]
        if layout.ordered:
            prepared.orders[site] = salient_first(inputs[site].magnitude * gain.abs().cpu(), layout.salient)
    if layouts["down"].salient:
        prepared.down_order = salient_first(inputs["mlp_out"].magnitude.to(device), layouts["down"].salient)
        prepared.block = permute_feed_forward(prepared.block, prepared.down_order)
    for site in SITES:
        if (recipe.down_scaling if site == "mlp_out" else recipe.scaling) == "awq":
            _scale(prepared, site, inputs[site], layouts, architecture, moments.get(site))
    if recipe.down_rotation == "hadamard":
        prepared.block, prepared.down_rotated = rotate_down(prepared.block), True
    return prepared


def _rotate_per_layer(prepared: PreparedBlock, inputs: BlockInputs, recipe: Recipe, device: torch.device) -> None:
    for site, norm in SITE_NORM.items():
        moment = inputs[site].moment
        assert moment is not None
        basis = _principal_axes(moment.to(device), recipe, recipe.salient)
        prepared.block = absorb_inputs(prepared.block, site, basis)
        prepared.rotations[NORMS[norm]] = prepared.transforms[site] = basis


def _rotate_concatenated(prepared: PreparedBlock, moments: Moments, recipe: Recipe, a: Architecture) -> None:
    """One basis over all heads at once: W_V cannot absorb it, so it is applied to W_O's inputs at run time."""
    basis = _principal_axes(moments["attn_out"], recipe, recipe.salient_per_head * a.heads)
    prepared.block = absorb_inputs(prepared.block, "attn_out", basis)
    prepared.rotations[LINEARS["o"]] = prepared.transforms["attn_out"] = basis


def _absorb_heads(prepared: PreparedBlock, inputs: BlockInputs, recipe: Recipe, a: Architecture, given: torch.Tensor | None, salient: int) -> None:
    if given is not None:
        bases = given
    elif recipe.head_rotation != "none":
        moment = inputs["attn_out"].moment
        assert moment is not None
        if recipe.head_rotation == "shared":
            moment = moment.mean(0, keepdim=True).expand_as(moment)
        device = prepared.block[f"{LINEARS['o']}.weight"].device
        bases = _principal_axes(moment.to(device), recipe, salient)
    elif salient:
        bases = salient_first_heads(inputs["attn_out"].magnitude, salient, a.heads, a.kv_heads)
    else:
        return
    prepared.block = absorb_heads(prepared.block, bases, a)
    prepared.transforms["attn_out"] = bases.repeat_interleave(a.heads // a.kv_heads, 0)


def _scale(
    prepared: PreparedBlock, site: str, inputs: SiteInputs, layouts: dict[str, LinearLayout], a: Architecture, moment_KK: torch.Tensor | None
) -> None:
    """Scale a site's input channels by AWQ's search, and let the weights before it absorb that."""
    block, roles = prepared.block, SITES[site]
    weight = torch.cat([block[f"{LINEARS[role]}.weight"] for role in roles])
    if moment_KK is not None:
        moment_KK = prepared.moment(site, moment_KK)
        loss = moment_loss(moment_KK)
    else:
        assert inputs.sample is not None
        order = slice(None) if prepared.down_order is None else prepared.down_order.cpu()
        loss = sample_loss(inputs.sample[:, order].to(weight))
    magnitude = prepared.magnitude(site, inputs, moment_KK).to(weight)
    if site == "attn_out":  # the query heads of a group share the values, and so the scale
        group = a.heads // a.kv_heads
        magnitude = magnitude.view(a.kv_heads, group, -1).mean(1, keepdim=True).expand(-1, group, -1).flatten()
    channels = prepared.orders[site].to(weight.device) if site in prepared.orders else torch.arange(weight.shape[1], device=weight.device)
    columns = channels[layouts[roles[0]].quantized_columns().to(weight.device)]
    layout = replace(layouts[roles[0]], out_features=weight.shape[0])

    def rounded(candidate: torch.Tensor) -> torch.Tensor:
        candidate[:, columns] = round_to_nearest(candidate[:, columns], layout)
        return candidate

    scale = search_scale(weight, magnitude, loss, rounded)
    if site == "mlp_out":
        prepared.block = scale_feed_forward(block, scale)
    elif site == "attn_out":
        prepared.block = scale_values(block, scale.view(a.kv_heads, -1, a.head_size)[:, 0], a)
    else:
        prepared.block = scale_residual_inputs(block, site, scale)
    prepared.scaled(site, scale)
