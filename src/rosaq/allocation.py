"""Bits where they count: the form of every site of every block that loses least at no more than so many bits per weight.

A site's loss in a form is what its outputs' error does to the model's predictions: KL ~ tr(dW M dW^T) / 2N, N the site's outputs,
M the second moment of its inputs, each token counted by what its errors cost (`sensitivity.py`), with the error dW that
rounding is expected to make (`rounding/expected.py`).
The choice is the Lagrangian one: all sites go along the convex hulls of their losses against their bits, steepest step
first, until no step fits (Shoham & Gersho, 1988, https://doi.org/10.1109/29.90373). Layers that are computed as one (q, k,
v; gate, up) are a site, so they stay of one form.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import torch

from rosaq.architecture import LINEARS, SITES
from rosaq.clock import Progress
from rosaq.distributed import ALONE
from rosaq.job import Job, prepare
from rosaq.moments import Flow, collect_moments
from rosaq.plan import block_linears, site_bits, site_options
from rosaq.recipe import SiteForm
from rosaq.rounding.expected import expected_loss, split
from rosaq.sensitivity import token_weights
from rosaq.statistics import Statistics, compute_dtype

TOKENS = 1 << 16  # of the calibration text that is looked at
ROWS = 3072  # outputs of a site that are, at most


@dataclass(frozen=True)
class Option:
    """A form that a site may get.

    Attributes:
        form: the form.
        bits: stored, of the site.
        loss: expected divergence, in nats per token.
    """

    form: SiteForm
    bits: int
    loss: float


def allocate(job: Job, statistics: Statistics, flow: Flow, progress: Progress) -> str:
    """The allocation of a recipe with `target_bits`, as `Recipe.allocation` has it.

    Two more passes over a part of the calibration text, one of them backward unless the flow has its tokens' weights already; one
    block in memory at a time. What is found serves other targets of the same statistics.

    Args:
        job: of the recipe without an allocation.
        statistics: of the whole calibration text.
        flow: how passes are run; one rank does this alone.
        progress: called as (stage, done, total).
    """
    key = job.recipe.replace(name="options", description="", target_bits=0.0, distillation_windows=0, distillation_epochs=0)
    if key not in statistics.options:
        statistics.options[key] = _options(job, statistics, replace(flow, start=0, ranks=ALONE), progress)
    forms = [str(option.form) for option in choose(statistics.options[key], _budget(job))]
    return " ".join(",".join(forms[start : start + len(SITES)]) for start in range(0, len(forms), len(SITES)))


def _options(job: Job, statistics: Statistics, flow: Flow, progress: Progress) -> list[list[Option]]:
    """The options of all blocks' sites."""
    source = job.source
    dtype, windows = compute_dtype(source, job.device), statistics.windows
    windows = windows[: max(1, TOKENS // windows.shape[1])]
    if flow.weights is None:
        flow = replace(flow, weights=token_weights(source, windows, job.device, dtype, flow, progress))
    sites: list[list[Option]] = []
    for index, moments in enumerate(collect_moments(source, windows, job.device, dtype, flow)):
        sites += _block_options(job, index, statistics, moments)
        del moments  # so that they are not held while the next block runs
        progress("allocation", index + 1, source.architecture.layers)
    return sites


def _budget(job: Job) -> int:
    """Stored bits that the sites' linear layers may take together."""
    plan, a = job.plan, job.source.architecture
    weights = a.layers * sum(layout.out_features * layout.in_features for layout in plan.blocks[0].values())
    beside = round(plan.bits_per_weight * weights) - sum(layout.bits_stored() for block in plan.blocks for layout in block.values())
    return int(job.recipe.target_bits * weights) - beside


def _block_options(job: Job, index: int, statistics: Statistics, moments: dict[str, torch.Tensor]) -> list[list[Option]]:
    """The options of one block's sites."""
    recipe, a = job.recipe, job.source.architecture
    given, feedback = moments if recipe.needs_moments else {}, recipe.rounding == "gptq"
    prepared = prepare(job, index, job.source.block(index, job.device), statistics.inputs[index], given)
    found = []
    for number, (site, forms) in enumerate(site_options(recipe).items()):
        moment_KK = prepared.moment(site, moments[site])
        order = prepared.orders[site].to(job.device) if site in prepared.orders else slice(None)
        moment_KK = moment_KK[order][:, order]
        weight_NK = torch.cat([prepared.block[f"{LINEARS[role]}.weight"][:, order] for role in SITES[site]])
        weight_NK = weight_NK[:: -(-len(weight_NK) // ROWS)]
        losses: dict[SiteForm, torch.Tensor] = {}
        parts = None  # of the weight, for one number of salient channels at a time
        for form in sorted(forms, key=lambda form: form.salient):
            all_forms = [form if place == number else other for place, other in enumerate(recipe.site_forms(index))]
            linears = block_linears(recipe, a, frozenset(), all_forms)
            stacked = replace(linears[SITES[site][0]], out_features=len(weight_NK))
            if parts is None or parts.channels != form.salient:
                parts = split(weight_NK, stacked, moment_KK, feedback)
            losses[form] = expected_loss(parts, stacked, recipe.clipping == "mse", feedback) / (2 * len(weight_NK))
        read = torch.stack([losses[form] for form in forms]).tolist()  # all at once: each waits for a GPU
        found.append([Option(form, site_bits(recipe, a, site, form), loss) for form, loss in zip(forms, read, strict=True)])
    return found


def choose(sites: Sequence[Sequence[Option]], budget: int) -> list[Option]:
    """One option of each site, so that their losses together are small and their bits no more than the budget.

    Raises:
        ValueError: the options of fewest bits together are more than the budget.
    """
    hulls = [hull(options) for options in sites]
    places, left = [0] * len(hulls), budget - sum(options[0].bits for options in hulls)
    if left < 0:
        raise ValueError(f"the smallest forms of all layers take {budget - left} bits, the target allows {budget}")
    steps = [
        ((after.loss - before.loss) / (after.bits - before.bits), site, place)
        for site, options in enumerate(hulls)
        for place, (before, after) in enumerate(pairwise(options))
    ]
    for _, site, place in sorted(steps):
        cost = hulls[site][place + 1].bits - hulls[site][place].bits
        if places[site] == place and cost <= left:
            places[site], left = place + 1, left - cost
    return [options[place] for options, place in zip(hulls, places, strict=True)]


def hull(options: Sequence[Option]) -> list[Option]:
    """The options on the lower convex hull of loss against bits, from the fewest bits on, the loss falling less and less."""
    found: list[Option] = []
    for option in sorted(options, key=lambda option: (option.bits, option.loss)):
        if found and option.loss >= found[-1].loss:
            continue
        while len(found) > 1 and _slope(found[-2], found[-1]) >= _slope(found[-2], option):
            found.pop()
        found.append(option)
    return found


def _slope(before: Option, after: Option) -> float:
    return (after.loss - before.loss) / (after.bits - before.bits)
