"""What every part of a model is quantized by, and the stored tensors of each: of a decoder block, of a table."""

import itertools
from dataclasses import dataclass, field, fields, replace
from typing import Any

import torch

from rosaq.architecture import FINAL_NORM, HEAD, LINEARS, SITES
from rosaq.basis import Bases, PreparedBlock, draw_bases, prepare_block, residual_basis
from rosaq.clock import Clock, Progress, no_progress
from rosaq.distributed import ALONE
from rosaq.learned import Learned, QuantizedModel, learn, learning_key
from rosaq.moments import BlockInputs
from rosaq.plan import Plan, make_plan
from rosaq.recipe import Recipe
from rosaq.rotation import Block
from rosaq.rounding.clipping import UNCLIPPED
from rosaq.rounding.linear import Rounding, quantize_linear, quantize_stacked
from rosaq.run import Run
from rosaq.source import Source
from rosaq.statistics import Statistics

ROWS = 1 << 12  # rows of a vocabulary table that are rotated and rounded at a time


@dataclass(frozen=True)
class ModelBases:
    """The bases that are not found from a block's own inputs, of the whole model.

    Attributes:
        residual: (D, D) of the residual stream where it is one for all blocks, else None.
        heads: (blocks, H, E, E) of the attention output where they are drawn or learned, else None.
        learning: how they were learned (`learned.Learned.record`), empty where they were not.
    """

    residual: torch.Tensor | None = None
    heads: torch.Tensor | None = None
    learning: dict[str, Any] = field(default_factory=dict)

    def to(self, device: str) -> "ModelBases":
        """The same on another device."""
        residual, heads = (None if basis is None else basis.to(device) for basis in (self.residual, self.heads))
        return ModelBases(residual, heads, self.learning)

    def of_block(self, index: int) -> Bases:
        """Those that block `index` absorbs."""
        return Bases(self.residual, None if self.heads is None else self.heads[index])


@dataclass(frozen=True)
class Job(Run):
    """A run that knows its bases: what every part of a model is quantized by.

    Attributes:
        bases: those of the whole model, on the device; the others are the run's.
    """

    bases: ModelBases

    @classmethod
    def of(cls, run: Run, bases: ModelBases) -> "Job":
        """A run, and the bases that were found for it."""
        return cls(**{entry.name: getattr(run, entry.name) for entry in fields(Run)}, bases=bases)


def make_job(source: Source, recipe: Recipe, statistics: Statistics, device: str, progress: Progress = no_progress) -> Job:
    """The job of a recipe by what a calibration has left, for one process."""
    run = Run(source, recipe, make_plan(recipe, source.architecture, source.biases()), device, ALONE, Clock(), progress)
    return Job.of(run, find_bases(run, statistics))


def find_bases(run: Run, statistics: Statistics) -> ModelBases:
    """The bases that all blocks share, on the device: drawn, learned, or out of the statistics."""
    if run.recipe.rotation == "learned":
        found = _learn(run, statistics)
        return ModelBases(found.residual, found.heads, found.record).to(run.device)
    residual, heads = draw_bases(run.recipe, run.source.architecture)
    if run.recipe.rotation == "global":
        residual = residual_basis(statistics.residual_moment().to(run.device), run.recipe)
    return ModelBases(residual, heads).to(run.device)


def _learn(run: Run, statistics: Statistics) -> Learned:
    """The recipe's learned rotations, learned once for all recipes that share the statistics."""
    recipe, key = run.recipe, learning_key(run.recipe)
    if key not in statistics.learned:
        windows, (residual, heads) = statistics.windows, draw_bases(recipe, run.source.architecture)
        assert residual is not None
        model = QuantizedModel(run.source, recipe, run.plan.blocks[0], windows.shape[1], run.device)
        statistics.learned[key] = learn(model, (residual, heads), windows, recipe, run.progress)
    return statistics.learned[key]


def prepare(job: Job, index: int, block: Block, inputs: BlockInputs, moments: dict[str, torch.Tensor]) -> PreparedBlock:
    """One decoder block in the basis that it is rounded in, float32; arguments as for `quantize_block`."""
    exact, a = {name: tensor.to(job.device, torch.float32) for name, tensor in block.items()}, job.source.architecture
    try:
        return prepare_block(exact, inputs, job.recipe, a, job.bases.of_block(index), job.plan.blocks[index], moments)
    except ValueError as error:
        raise ValueError(f"decoder block {index}: {error}") from error


def quantize_block(job: Job, index: int, block: Block, inputs: BlockInputs, moments: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The stored tensors of one decoder block, by full name.

    Args:
        job: what to quantize by.
        index: of the block.
        block: the source's tensors.
        inputs: what calibration kept of it.
        moments: site -> second moment (K, K) as `collect_moments` gives it, where the recipe needs it; else empty.
    """
    source, prefix = job.source, job.source.architecture.block_prefix(index)
    with job.clock("preparing"):
        prepared = prepare(job, index, block, inputs, moments)
        turned = {site: prepared.moment(site, moment) for site, moment in moments.items()}
    stored = {prefix + name: tensor for name, tensor in _round_block(prepared, turned, job, index).items()}
    for module, rotation in prepared.rotations.items():
        stored[f"{prefix}{module}.rotation"] = rotation.half()
    linear_weights = {f"{module}.{part}" for module in LINEARS.values() for part in ("weight", "bias")}
    for name, tensor in prepared.block.items():
        if name not in linear_weights:
            stored[prefix + name] = tensor.to(source.dtype)
    return stored


def _round_block(prepared: PreparedBlock, moments: dict[str, torch.Tensor], job: Job, index: int) -> dict[str, torch.Tensor]:
    recipe, linears, stored = job.recipe, job.plan.blocks[index], {}
    for site, roles in SITES.items():
        order = prepared.orders[site].to(job.device) if site in prepared.orders else None
        for clipped, together in itertools.groupby(roles, lambda role: recipe.clipping != "awq" or role not in UNCLIPPED):
            modules = {LINEARS[role]: linears[role] for role in together}
            weights = [prepared.block[f"{module}.weight"] for module in modules]
            rounding = Rounding(recipe.rounding == "gptq", recipe.act_order, recipe.clipping if clipped else "none", recipe.refinement)
            try:
                layers = quantize_stacked(weights, list(modules.values()), order, moments.get(site), rounding)
            except ValueError as error:
                raise ValueError(f"{job.source.architecture.block_prefix(index)}{', '.join(modules)}: {error}") from error
            for module, tensors in zip(modules, layers, strict=True):
                if f"{module}.bias" in prepared.block:
                    tensors["bias"] = prepared.block[f"{module}.bias"].half()
                stored.update({f"{module}.{name}": tensor for name, tensor in tensors.items()})
    return stored


def quantize_table(job: Job, module: str) -> dict[str, torch.Tensor]:
    """Embedding, final norm or lm_head: rotated with the residual stream, at 8 bits where the plan says so."""
    source, basis = job.source, job.bases.residual
    gain = source.final_norm()
    if module == FINAL_NORM:
        return {f"{FINAL_NORM}.weight": (gain if basis is None else torch.ones_like(gain)).to(source.dtype)}
    table = source.head() if module == HEAD else source.embedding()
    parts: dict[str, list[torch.Tensor]] = {}
    for start in range(0, table.shape[0], ROWS):
        rows = table[start : start + ROWS].to(job.device, torch.float32)
        if basis is not None:
            rows = (rows * gain.to(rows) if module == HEAD else rows) @ basis.to(rows)
        for name, tensor in _table_rows(rows, job.plan, module, source.dtype).items():
            parts.setdefault(name, []).append(tensor.cpu())
    return {f"{module}.{name}": torch.cat(tensors) for name, tensors in parts.items()}


def _table_rows(rows: torch.Tensor, plan: Plan, module: str, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    if module not in plan.tables:
        return {"weight": rows.to(dtype)}
    return quantize_linear(rows, replace(plan.tables[module], out_features=rows.shape[0]))
