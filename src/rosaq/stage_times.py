"""Seconds of each stage of a run: counts of its operations over what the device does per second (`rates.py`).

Shares and counts of launches that no formula gives are by measurement: on the CPU with SmolLM2-135M, on an H200 with the shape of
Llama-2-7B (docs/log.md, 2026-11-22). Letters: N outputs, Q inputs of a layer, G its groups.
"""

from dataclasses import dataclass
from statistics import mean

import torch

from rosaq.allocation import ROWS, TOKENS
from rosaq.architecture import LINEARS, SITE_NORM, SITE_OF, SITES, Architecture
from rosaq.calibration import Calibration
from rosaq.learned import BATCH
from rosaq.moments import SAMPLED_TOKENS
from rosaq.plan import OPTION_GROUPS, Plan, site_options
from rosaq.rates import DISK, Rates
from rosaq.recipe import ABSORBED, Recipe
from rosaq.rounding.clipping import SHARES, UNCLIPPED, shrunk_grids
from rosaq.rounding.refinement import BLOCK
from rosaq.rounding.scaling import STEPS
from rosaq.sensitivity import SEGMENT

REACHED = {"cpu": 0.85, "cuda": 0.6}  # share of a bare product's rate that stages reach
COARSE = 0.5  # rate of TF32 products on a GPU, which searches and logits are content with, of that in half precision
BACKWARD = 4  # times a pass forward: once forward, once more for the inputs, and back, without gradients of weights
DISTILLING = 10  # operations a weight and token: the teacher forward, the student forward, once more, and back
EIGEN = 10  # operations over n^3 of an eigendecomposition, which runs at EIGEN_RATE of a product's rate
EIGEN_RATE = 0.2
COLUMN_LAUNCHES = 8  # operations that GPTQ starts for each channel on the CPU; on a GPU one kernel takes a group at a time
GROUP_LAUNCHES = 30  # for each group there, and for each block of channels of a refining sweep, the search of its range included
SAMPLED_TOGETHER = 64  # windows that "self" samples at a time
LAYER_LAUNCHES = 40  # operations of a decoder block for one token


@dataclass(frozen=True)
class Speed:
    """What stages reach of a device's rates, in operations per second.

    Attributes:
        rates: as they were measured.
        kind: "cpu" or "cuda".
        product: of products in the type that blocks run in.
        exact: of those in float32.
        coarse: of those for which TF32 will do.
    """

    rates: Rates
    kind: str
    product: float
    exact: float
    coarse: float

    @classmethod
    def of(cls, rates: Rates, kind: str) -> "Speed":
        """By the shares that were measured."""
        product, exact = rates.product * REACHED[kind], rates.exact * REACHED[kind]
        return cls(rates, kind, product, exact, product * COARSE if kind == "cuda" else exact)


def stage_seconds(a: Architecture, recipe: Recipe, plan: Plan, calibration: Calibration, rates: Rates, kind: str) -> dict[str, float]:
    """Seconds of each stage on one device.

    Args:
        a: the model's sizes.
        recipe: the recipe.
        plan: the recipe laid out over the model.
        calibration: how much text.
        rates: of the device.
        kind: "cpu" or "cuda".
    """
    speed, tokens, weights, found = Speed.of(rates, kind), calibration.samples * calibration.seq_len, sum(_weights(a).values()), {}
    table = 2 * a.vocabulary * a.hidden  # bytes
    reading_table = 2 * table / rates.read  # once more to see that its numbers are finite
    waits = recipe.target_bits > 0 and not recipe.allocation  # whether forms are to be found
    run = tokens * _forward(a, calibration.seq_len) / speed.product
    found["text"] = _sampling(a, calibration, speed) if calibration.text == "self" else 0.0
    found["embedding"] = reading_table
    found["activations"] = a.layers * (run + tokens * 2 * (2 * a.hidden**2 + a.width("attn_out") * a.head_size) / speed.product)
    if recipe.token_weights == "gradient":
        found["gradients"] = _gradients(a, tokens, calibration.seq_len, speed) + 2 * reading_table
    if waits:
        found["allocation"] = _allocation(a, recipe, tokens, calibration.seq_len, speed)
    if recipe.needs_moments:
        found["second pass"] = a.layers * (run + tokens * 2 * sum(a.width(site) ** 2 for site in SITES) / speed.product)
    if recipe.rotation == "learned":
        step = min(BATCH, calibration.samples) * calibration.seq_len * 8 * weights / speed.product + weights / rates.fitted
        found["learning"] = recipe.learning_steps * a.layers * step
    found["rotation"] = _eigen(a.hidden, speed) if recipe.rotation == "global" else 0.0
    found["preparing"] = a.layers * _preparing(a, recipe, speed)
    found["rounding"] = a.layers * _rounding(a, recipe, speed, OPTION_GROUPS if waits else (recipe.group_size,))
    copies, stored = 1 if plan.tied else 2, sum(layout.bits_stored() for layout in plan.tables.values()) / 8
    tables = stored or copies * table
    found["tables"] = copies * reading_table + tables / DISK + _tables(a, recipe, plan, speed)
    if recipe.distillation_windows:
        trained = recipe.distillation_windows * recipe.distillation_epochs * calibration.seq_len
        found["distillation"] = trained * DISTILLING * (a.layers * weights + a.vocabulary * a.hidden) / speed.product
    reading = _readings(recipe, waits) * 2 * a.layers * weights / rates.read
    behind = sum(found.values()) if kind == "cuda" else 0.0  # on a GPU the next block is read meanwhile
    found["reading"] = max(0.0, reading - behind)
    found["writing"] = plan.checkpoint_bytes / rates.hashed + (plan.checkpoint_bytes - tables) / DISK
    return found


def _weights(a: Architecture) -> dict[str, int]:
    return {role: torch.Size(a.shape(role)).numel() for role in LINEARS}


def _forward(a: Architecture, seq_len: int) -> int:
    """Operations of one block for one token."""
    return 2 * sum(_weights(a).values()) + 4 * seq_len * a.width("attn_out")


def _sampling(a: Architecture, calibration: Calibration, speed: Speed) -> float:
    """Of windows that the model samples itself, token by token."""
    steps = -(-calibration.samples // SAMPLED_TOGETHER) * calibration.seq_len
    each = 2 * min(SAMPLED_TOGETHER, calibration.samples) * (sum(_weights(a).values()) * a.layers + a.vocabulary * a.hidden)
    return steps * (each / speed.product + a.layers * LAYER_LAUNCHES / speed.rates.launches)


def _gradients(a: Architecture, tokens: int, seq_len: int, speed: Speed) -> float:
    """Of a pass backward through all blocks, begun by the gradient of the predictions, whose products are three with lm_head."""
    return tokens * (a.layers * BACKWARD * _forward(a, seq_len) / speed.product + 3 * 2 * a.vocabulary * a.hidden / speed.coarse)


def _readings(recipe: Recipe, waits: bool) -> float:
    """How often all blocks are read: by each pass over the text, and to be rounded."""
    backward = 3 - 1 / SEGMENT
    found = 2 + recipe.needs_moments + (backward if recipe.token_weights == "gradient" else 0)
    return found + ((2 if recipe.token_weights == "gradient" else 2 + backward) if waits else 0)


def _eigen(size: int, speed: Speed, count: int = 1) -> float:
    """Of symmetric matrices, together: each is cut down row by row, each row by some small operations."""
    return count * EIGEN * size**3 / (EIGEN_RATE * speed.exact) + EIGEN * size / speed.rates.launches


def _preparing(a: Architecture, recipe: Recipe, speed: Speed) -> float:
    """Of one block: its bases and their products with weights and moments, and AWQ's searches for scales."""
    seconds, weights = 0.0, _weights(a)
    if recipe.rotation != "none":
        moments = 2 * 2 * 2 * a.hidden**3 if recipe.needs_moments else 0
        seconds += (2 * a.hidden * sum(weights.values()) + moments) / speed.exact
    if recipe.rotation == "per-layer":
        seconds += len(SITE_NORM) * _eigen(a.hidden, speed)
    if recipe.head_rotation == "head-wise":
        seconds += _eigen(a.head_size, speed, a.kv_heads)
    if recipe.head_rotation == "shared":
        seconds += _eigen(a.head_size, speed)
    if recipe.head_rotation == "concatenated":
        seconds += _eigen(a.width("attn_out"), speed)
    for site, roles in SITES.items():
        if (recipe.down_scaling if site == "mlp_out" else recipe.scaling) == "awq":
            sampled = site == "mlp_out" and not recipe.needs_moments
            loss = 2 * SAMPLED_TOKENS / speed.exact if sampled else 2 * a.width(site) / speed.coarse
            seconds += STEPS * sum(weights[role] for role in roles) * (1 / speed.rates.fitted + loss)
    return seconds


def _allocation(a: Architecture, recipe: Recipe, tokens: int, seq_len: int, speed: Speed) -> float:
    """Of second moments of some of the text, gradients of it if they are not there, and the expected loss of every form of every site."""
    tokens, weights = min(tokens, max(TOKENS, seq_len)), sum(_weights(a).values())
    gradients = 0.0 if recipe.token_weights == "gradient" else _gradients(a, tokens, seq_len, speed)
    moments = tokens * (_forward(a, seq_len) + 2 * sum(a.width(site) ** 2 for site in SITES)) / speed.product
    options = site_options(recipe)
    seen = {site: a.width(site) * min(ROWS, sum(a.shape(role)[0] for role in roles)) for site, roles in SITES.items()}
    fits = sum(size * (len(shrunk_grids(form.bits)) if recipe.clipping == "mse" else 1) for site, size in seen.items() for form in options[site])
    factors = 0.0
    if recipe.rounding == "gptq":  # one for each number of salient channels
        factors = sum(len({form.salient for form in forms}) * _factor(a.width(site), speed) for site, forms in options.items())
    prepared = _preparing(a, recipe, speed) + 2 * weights / speed.rates.read
    return gradients + a.layers * (moments + fits / speed.rates.fitted + factors + prepared)


def _factor(width: int, speed: Speed) -> float:
    """Of the factor of a second moment's inverse, in float64."""
    return 4 * width**3 / speed.exact


def _rounding(a: Architecture, recipe: Recipe, speed: Speed, groups: tuple[int, ...]) -> float:
    """Of one block: grids and codes, with the searches for ranges and GPTQ's feedback and refinement where the recipe has them.

    Where the forms of the sites are not known yet, a site has any of the group sizes alike.
    """
    weights = _weights(a)
    seconds = sum(weights.values()) / speed.rates.packed
    if recipe.clipping == "awq":
        searched = sum(size for role, size in weights.items() if role not in UNCLIPPED)
        seconds += len(SHARES) * searched * (1 / speed.rates.fitted + 2 * recipe.group_size / speed.exact)
    if recipe.clipping == "mse":
        seconds += len(shrunk_grids(recipe.bits)) * sum(weights.values()) / speed.rates.fitted
    if recipe.rounding == "gptq":
        seconds += sum(size * _feedback(a.width(SITE_OF[role]), recipe, groups) for role, size in weights.items()) / speed.exact
        for site in SITES:
            seconds += _factor(a.width(site), speed) + _launches(a.width(site), recipe, groups, speed.kind) / speed.rates.launches
    return seconds


def _feedback(width: int, recipe: Recipe, groups: tuple[int, ...]) -> float:
    """Operations of GPTQ for a weight of a layer: errors to the channels that follow, N Q^2.

    A sweep over the codes is three times that, for the gradient and what moves in it; a fit of the scales four times, for two
    products with the moment, and G^2 for each weight between its groups.
    """
    found = width + 2.0 * recipe.group_size
    if recipe.refinement:
        fit = 4 * width + 2 * mean((width / group) ** 2 for group in groups)
        found += recipe.refinement * (3 * width + 2 * BLOCK) + (1 + recipe.refinement) * fit
    return found


def _launches(width: int, recipe: Recipe, groups: tuple[int, ...], kind: str) -> float:
    """Operations that GPTQ and its refinement start for a site, however many outputs there are."""
    if kind == "cpu":
        return (1 + recipe.refinement) * COLUMN_LAUNCHES * width
    return GROUP_LAUNCHES * (mean(width / group for group in groups) + recipe.refinement * width / BLOCK)


def _tables(a: Architecture, recipe: Recipe, plan: Plan, speed: Speed) -> float:
    """Of embedding and lm_head: rotated, and rounded to 8 bits where the plan says so."""
    size = a.vocabulary * a.hidden
    rotated = 2 * a.hidden * 2 * size / speed.exact if recipe.rotation in ABSORBED else 0.0
    return rotated + (2 * size / speed.rates.packed if plan.tables else 0.0)
