"""What rounding loses in each layer: of the weight, and of the layer's output on the calibration text."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from rosaq.architecture import LINEARS, SITES
from rosaq.checkpoint import is_checkpoint, verify
from rosaq.clock import Progress, no_progress
from rosaq.engines.transformers import RosaqConfig
from rosaq.inspection.channels import LEAST
from rosaq.inspection.observation import Observation
from rosaq.job import Job, make_job, prepare, quantize_block
from rosaq.kernels.reference import dequantize
from rosaq.recipe import Recipe
from rosaq.rotation import Block
from rosaq.run import Means
from rosaq.safetensors_folder import SafetensorsFolder
from rosaq.source import Source
from rosaq.statistics import Statistics

Stored = Callable[[int, Block, dict[str, torch.Tensor]], Mapping[str, torch.Tensor]]


@dataclass(frozen=True)
class LayerError:
    """Relative errors of one quantized layer.

    Attributes:
        block: its decoder block.
        role: q, k, v, o, gate, up or down.
        weight: |dW| / |W|, Frobenius.
        output: |X dW^T| / |X W^T| over the calibration text, that is sqrt(tr(dW M dW^T) / tr(W M W^T)).
    """

    block: int
    role: str
    weight: float
    output: float


def relative_errors(weight_NK: torch.Tensor, rounded_NK: torch.Tensor, moment_KK: torch.Tensor) -> tuple[float, float]:
    """Relative error of a weight, and of its outputs for inputs of second moment M; both in the inputs' basis; nothing of nothing is 0."""
    weight, moment = weight_NK.double(), moment_KK.to(weight_NK.device).double()
    error = rounded_NK.double() - weight
    output = (error @ moment * error).sum().clamp_min(0) / (weight @ moment * weight).sum().clamp_min(LEAST)
    return float(error.norm() / weight.norm().clamp_min(LEAST)), float(output.sqrt())


def recipe_errors(
    source: Source,
    recipe: Recipe,
    statistics: Statistics,
    observed: Iterable[dict[str, Observation]],
    device: str,
    every: int = 1,
    progress: Progress = no_progress,
) -> list[LayerError]:
    """Errors of each layer as a recipe quantizes it; nothing is written.

    Args:
        source: the model.
        recipe: the recipe.
        statistics: what it calibrates on.
        observed: what the outputs are measured on: of the same text, or of another.
        device: where to compute.
        every: look at every so many decoder blocks only.
        progress: called as (stage, done, total), where gradients are taken.

    Raises:
        ValueError: the recipe has a target for which no allocation is found yet.
    """
    if recipe.target_bits and not recipe.allocation:
        raise ValueError(
            f"recipe {recipe.name!r} has target_bits {recipe.target_bits:g} and no allocation; quantize by it, and take its checkpoint's recipe"
        )
    job = make_job(source, recipe, statistics, device, progress)

    def stored(index: int, block: Block, moments: dict[str, torch.Tensor]) -> Mapping[str, torch.Tensor]:
        return quantize_block(job, index, block, statistics.inputs[index], moments)

    return _errors(job, statistics, observed, stored, every)


def checkpoint_errors(
    source: Source,
    folder: Path,
    statistics: Statistics,
    observed: Iterable[dict[str, Observation]],
    device: str,
    progress: Progress = no_progress,
) -> list[LayerError]:
    """Errors of each layer of a checkpoint against its original.

    The original is put into the checkpoint's basis, which is made again from the same calibration windows.

    Raises:
        ValueError: the checkpoint was calibrated on other windows, or is not this model's.
    """
    if not is_checkpoint(folder):
        raise ValueError(f"{folder}: not the folder of a rosaq checkpoint")
    verify(folder)
    config = RosaqConfig.of(folder)
    found, wanted = config.calibration.get("windows_sha256"), statistics.record["windows_sha256"]
    if found != wanted:
        raise ValueError(f"{folder}: calibrated on windows with SHA-256 {found}, not {wanted}; give the calibration that it was made with")
    tensors = SafetensorsFolder(folder)
    job = make_job(source, Recipe.from_dict(config.recipe, str(folder)), statistics, device, progress)
    for role, module in LINEARS.items():
        name, form = f"{source.architecture.block_prefix(0)}{module}.qweight", job.plan.blocks[0][role].tensors()["qweight"][0]
        if name not in tensors or tuple(tensors[name].shape) != form:
            raise ValueError(f"{folder}: tensor {name!r} is not of shape {form}, so this is not a checkpoint of {source.name}")
    errors = _errors(job, statistics, observed, lambda index, *_: tensors)
    worst = max(errors, key=lambda error: error.weight)
    if worst.weight > 1:
        raise ValueError(f"{folder}: {worst.role} of block {worst.block} is nothing like the original's, so it is not a checkpoint of {source.name}")
    return errors


def _errors(job: Job, statistics: Statistics, observed: Iterable[dict[str, Observation]], stored: Stored, every: int = 1) -> list[LayerError]:
    # A recipe that searches by the moments must see the very ones that it was quantized by. Observing keeps hidden states of its own.
    flow, backward = job.flows(statistics.windows, Means(), None, beside=1)
    if job.recipe.token_weights == "gradient":
        flow = replace(flow, weights=job.weights(statistics, backward))
    found = []
    for index, (sites, given) in enumerate(zip(observed, job.moments(statistics, flow), strict=True)):
        if index % every:
            continue
        block = job.source.block(index, job.device)
        prepared, tensors = prepare(job, index, block, statistics.inputs[index], given), stored(index, block, given)
        prefix = job.source.architecture.block_prefix(index)
        for site, roles in SITES.items():
            moment = prepared.moment(site, sites[site].moment.to(job.device))
            for role in roles:
                module, layout = LINEARS[role], job.plan.blocks[index][role]
                weight = prepared.block[f"{module}.weight"]
                parts = {name: tensors[f"{prefix}{module}.{name}"].to(weight.device) for name in layout.tensors() if name != "bias"}
                found.append(LayerError(index, role, *relative_errors(weight, dequantize(layout, parts), moment)))
    return found
