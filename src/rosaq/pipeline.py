"""The method in order, one call a stage; reads like the paper's algorithm (ROSAQ section 4, arXiv:2506.13472)."""

import copy
import itertools
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from rosaq.architecture import EMBEDDING, FINAL_NORM, HEAD, LINEARS, SITES
from rosaq.basis import Bases, PreparedBlock, draw_bases, prepare_block, residual_basis
from rosaq.calibration import Calibration
from rosaq.card import model_card
from rosaq.checkpoint import FORMAT_VERSION, CheckpointWriter, check_destination
from rosaq.clock import Clock, Progress, no_progress, peak_memory
from rosaq.device import resolve_device
from rosaq.learned import DEPENDS_ON, Learned, QuantizedModel, learn
from rosaq.moments import BlockInputs
from rosaq.plan import Plan, make_plan
from rosaq.recipe import Recipe, load_recipe
from rosaq.rounding.clipping import UNCLIPPED
from rosaq.rounding.linear import Rounding, quantize_linear, quantize_stacked
from rosaq.source import Source, open_source
from rosaq.statistics import Statistics, measure

ROWS = 1 << 15  # rows of a vocabulary table that are rotated and rounded at a time


@dataclass
class Report:
    """What a run did, JSON-able: sizes, time of each stage in seconds, peak memory in bytes, `learned.Learned.record`."""

    recipe: dict[str, Any]
    calibration: dict[str, Any]
    device: str
    bits_per_weight: float
    checkpoint_bytes: int
    original_bytes: int
    seconds: dict[str, float] = field(default_factory=dict)
    peak_host_bytes: int = 0
    peak_device_bytes: int = 0
    learning: dict[str, Any] = field(default_factory=dict)


def quantize(
    model: str | Source,
    output: str | Path,
    recipe: str | Recipe = "rosaq-int4",
    calibration: Calibration | Statistics | None = None,
    device: str = "auto",
    progress: Progress = no_progress,
) -> Report:
    """Quantize a model into a checkpoint folder that transformers loads.

    Args:
        model: hub id, local folder, `.gguf` file, or an opened source.
        output: folder to make; it must not exist, or be empty.
        recipe: a `Recipe`, the name of a shipped one, or a `.toml` file.
        calibration: which text, and how much of it; by default 128 windows of 2048 tokens of the Pile. Or the
            statistics that `measure` made of it, to share them between recipes.
        device: "auto" (a CUDA GPU where there is one), "cpu", "cuda" or "cuda:N".
        progress: called as (stage, done, total).

    Returns:
        Sizes, times and memory of the run.

    Raises:
        ValueError: whatever is wrong with the model, the recipe, the text or the destination; nothing is left behind.
    """
    clock = Clock()
    recipe = load_recipe(recipe) if isinstance(recipe, str) else recipe
    device = resolve_device(device)
    check_destination(Path(output).expanduser().absolute())
    with clock("open"):
        source = open_source(model) if isinstance(model, str) else model
        plan = make_plan(recipe, source.architecture, _biases(source))
    with CheckpointWriter(output) as writer:
        if not isinstance(calibration, Statistics):
            calibration = measure(source, calibration or Calibration(), device, progress, clock)
        inputs = calibration.inputs
        with clock("learning" if recipe.rotation == "learned" else "rotation"):
            job = make_job(source, recipe, calibration, device, progress)
        with clock("rounding"):
            for index, moments in enumerate(_moments(job, calibration)):
                writer.add(quantize_block(job, index, inputs[index], moments))
                progress("rounding", index + 1, source.architecture.layers)
            writer.add(quantize_tables(job))
        sizes = (plan.bits_per_weight, plan.checkpoint_bytes, plan.original_bytes)
        learned = job.learned.record if job.learned else {}
        report = Report(recipe.to_dict(), calibration.record, device, *sizes, clock.seconds, *peak_memory(device), learned)
        with clock("writing"):
            _finish(writer, source, plan, report)
    return report


@dataclass(frozen=True)
class Job:
    """What every part of a model is quantized by.

    Attributes:
        source: the model.
        recipe: the recipe.
        plan: the recipe laid out over the model.
        device: where to compute.
        basis: (D, D) of the residual stream where it is one for all, else None.
        head_bases: (blocks, H, E, E) of the attention output where they are drawn or learned, else None.
        learned: how they were learned, where they were.
    """

    source: Source
    recipe: Recipe
    plan: Plan
    device: str
    basis: torch.Tensor | None
    head_bases: torch.Tensor | None
    learned: Learned | None = None

    def bases(self, index: int) -> Bases:
        """Those that block `index` absorbs."""
        return Bases(self.basis, None if self.head_bases is None else self.head_bases[index])


def _learn(source: Source, recipe: Recipe, plan: Plan, statistics: Statistics, device: str, progress: Progress) -> Learned:
    """The recipe's learned rotations, learned once for all recipes that share the statistics."""
    key = tuple(getattr(recipe, name) for name in DEPENDS_ON)
    if key not in statistics.learned:
        windows, (residual, heads) = statistics.windows, draw_bases(recipe, source.architecture)
        assert residual is not None
        model = QuantizedModel(source, recipe, plan.linears, windows.shape[1], device)
        statistics.learned[key] = learn(model, (residual, heads), windows, recipe, progress)
    return statistics.learned[key]


def _moments(job: Job, statistics: Statistics) -> Iterator[dict[str, torch.Tensor]]:
    """Whole second moments of each block's sites where the recipe looks at them, by a second pass or held; else nothing."""
    if job.recipe.needs_moments:
        return statistics.second_moments(job.source, job.device)
    return iter([{}] * job.source.architecture.layers)


def make_job(source: Source, recipe: Recipe, statistics: Statistics, device: str, progress: Progress = no_progress) -> Job:
    """The job of a recipe: the plan, and the bases that all blocks share, drawn, learned or out of the statistics."""
    plan = make_plan(recipe, source.architecture, _biases(source))
    if recipe.rotation == "learned":
        learned = _learn(source, recipe, plan, statistics, device, progress)
        return Job(source, recipe, plan, device, learned.residual, learned.heads, learned)
    basis, head_bases = draw_bases(recipe, source.architecture)
    if recipe.rotation == "global":
        basis = residual_basis(statistics.inputs, recipe, device)
    return Job(source, recipe, plan, device, basis, head_bases)


def prepare(job: Job, index: int, inputs: BlockInputs, moments: dict[str, torch.Tensor]) -> PreparedBlock:
    """One decoder block in the basis that it is rounded in, float32; arguments as for `quantize_block`."""
    source = job.source
    block = {name: tensor.to(job.device, torch.float32) for name, tensor in source.block(index).items()}
    return prepare_block(block, inputs, job.recipe, source.architecture, job.bases(index), job.plan.linears, moments)


def quantize_block(job: Job, index: int, inputs: BlockInputs, moments: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The stored tensors of one decoder block, by full name.

    Args:
        job: what to quantize by.
        index: of the block.
        inputs: what calibration kept of it.
        moments: site -> second moment (K, K) as `collect_moments` gives it, where the recipe needs it; else empty.
    """
    source, prefix = job.source, job.source.architecture.block_prefix(index)
    prepared = prepare(job, index, inputs, moments)
    turned = {site: prepared.moment(site, moment) for site, moment in moments.items()}
    stored = {prefix + name: tensor for name, tensor in _round_block(prepared, turned, job, prefix).items()}
    for module, rotation in prepared.rotations.items():
        stored[f"{prefix}{module}.rotation"] = rotation.half()
    linear_weights = {f"{module}.{part}" for module in LINEARS.values() for part in ("weight", "bias")}
    for name, tensor in prepared.block.items():
        if name not in linear_weights:
            stored[prefix + name] = tensor.to(source.dtype)
    return stored


def _round_block(prepared: PreparedBlock, moments: dict[str, torch.Tensor], job: Job, prefix: str) -> dict[str, torch.Tensor]:
    recipe, stored = job.recipe, {}
    for site, roles in SITES.items():
        order = prepared.orders[site].to(job.device) if site in prepared.orders else None
        for clipped, together in itertools.groupby(roles, lambda role: recipe.clipping == "awq" and role not in UNCLIPPED):
            modules = {LINEARS[role]: job.plan.linears[role] for role in together}
            weights = [prepared.block[f"{module}.weight"] for module in modules]
            rounding = Rounding(recipe.rounding == "gptq", recipe.act_order, clipped)
            try:
                layers = quantize_stacked(weights, list(modules.values()), order, moments.get(site), rounding)
            except ValueError as error:
                raise ValueError(f"{prefix}{', '.join(modules)}: {error}") from error
            for module, tensors in zip(modules, layers, strict=True):
                if f"{module}.bias" in prepared.block:
                    tensors["bias"] = prepared.block[f"{module}.bias"].half()
                stored.update({f"{module}.{name}": tensor for name, tensor in tensors.items()})
    return stored


def quantize_tables(job: Job) -> dict[str, torch.Tensor]:
    """Embedding, final norm and lm_head: rotated with the residual stream, at 8 bits where the plan says so."""
    source, basis = job.source, job.basis
    gain = source.final_norm()
    stored = {f"{FINAL_NORM}.weight": (gain if basis is None else torch.ones_like(gain)).to(source.dtype)}
    names = {EMBEDDING: source.embedding()} if job.plan.tied else {EMBEDDING: source.embedding(), HEAD: source.head()}
    for module, table in names.items():
        parts: dict[str, list[torch.Tensor]] = {}
        for start in range(0, table.shape[0], ROWS):
            rows = table[start : start + ROWS].to(job.device, torch.float32)
            if basis is not None:
                rows = (rows * gain.to(rows) if module == HEAD else rows) @ basis.to(rows)
            for name, tensor in _table_rows(rows, job.plan, module, source.dtype).items():
                parts.setdefault(name, []).append(tensor.cpu())
        stored.update({f"{module}.{name}": torch.cat(tensors) for name, tensors in parts.items()})
    return stored


def _table_rows(rows: torch.Tensor, plan: Plan, module: str, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    if module not in plan.tables:
        return {"weight": rows.to(dtype)}
    return quantize_linear(rows, replace(plan.tables[module], out_features=rows.shape[0]))


def _finish(writer: CheckpointWriter, source: Source, plan: Plan, report: Report) -> None:
    config = copy.deepcopy(source.config)
    config.tie_word_embeddings = plan.tied
    config.dtype = source.dtype
    config.quantization_config = {
        "quant_method": "rosaq",
        "format_version": FORMAT_VERSION,
        "recipe": report.recipe,
        "calibration": report.calibration,
        "layouts": {LINEARS[role]: layout.form() for role, layout in plan.linears.items()}
        | {module: layout.form() for module, layout in plan.tables.items()},
        "rotated_norms": list(plan.rotated_norms),
    }
    if plan.hadamard_inputs:
        config.quantization_config["hadamard_inputs"] = list(plan.hadamard_inputs)
    if plan.rotated_inputs:
        config.quantization_config["rotated_inputs"] = list(plan.rotated_inputs)
    companions = [part for part in (source.tokenizer, source.generation_config) if part is not None]
    writer.finish(config, {"report": vars(report)}, {"README.md": model_card(source, report)}, companions)


def _biases(source: Source) -> frozenset[str]:
    prefix = source.architecture.block_prefix(0)
    return frozenset(role for role, module in LINEARS.items() if f"{prefix}{module}.bias" in source.tensors)
