"""The method in order, one call a stage; reads like the paper's algorithm (ROSAQ section 4, arXiv:2506.13472)."""

import copy
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from rosaq.architecture import EMBEDDING, FINAL_NORM, HEAD, LINEARS, SITE_OF
from rosaq.basis import PreparedBlock, prepare_block, residual_moment
from rosaq.calibration import Calibration
from rosaq.card import model_card
from rosaq.checkpoint import CheckpointWriter, check_destination, quantization_config
from rosaq.clock import Clock, Progress, no_progress, peak_memory
from rosaq.device import resolve_device
from rosaq.moments import BlockInputs, collect_moments
from rosaq.plan import Plan, make_plan
from rosaq.recipe import Recipe, load_recipe
from rosaq.rotation import principal_basis
from rosaq.rounding.linear import quantize_linear
from rosaq.source import Source, open_source
from rosaq.statistics import Statistics, compute_dtype, measure

ROWS = 1 << 15  # rows of a vocabulary table that are rotated and rounded at a time


@dataclass
class Report:
    """What a run did, JSON-able: sizes, time of each stage in seconds, peak memory in bytes."""

    recipe: dict[str, Any]
    calibration: dict[str, Any]
    device: str
    bits_per_weight: float
    checkpoint_bytes: int
    original_bytes: int
    seconds: dict[str, float] = field(default_factory=dict)
    peak_host_bytes: int = 0
    peak_device_bytes: int = 0


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
        with clock("rotation"):
            basis = principal_basis(residual_moment(inputs).to(device))[0] if recipe.rotation == "global" else None
        with clock("rounding"):
            job = Job(source, recipe, plan, basis, device)
            for index, moments in enumerate(_moments(job, calibration.windows)):
                writer.add(quantize_block(job, index, inputs[index], moments))
                progress("rounding", index + 1, source.architecture.layers)
            writer.add(quantize_tables(job))
        sizes = (plan.bits_per_weight, plan.checkpoint_bytes, plan.original_bytes)
        report = Report(recipe.to_dict(), calibration.record, device, *sizes, clock.seconds, *peak_memory(device))
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
        basis: (D, D) of the residual stream where it is one for all, else None.
        device: where to compute.
    """

    source: Source
    recipe: Recipe
    plan: Plan
    basis: torch.Tensor | None
    device: str


def _moments(job: Job, windows: torch.Tensor) -> Iterator[dict[str, torch.Tensor]]:
    """Whole second moments of each block's sites where the rounding looks at them, by a second pass; else nothing."""
    if job.recipe.rounding == "gptq":
        return collect_moments(job.source, windows, job.device, compute_dtype(job.source, job.device))
    return iter([{}] * job.source.architecture.layers)


def quantize_block(job: Job, index: int, inputs: BlockInputs, moments: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The stored tensors of one decoder block, by full name.

    Args:
        job: what to quantize by.
        index: of the block.
        inputs: what calibration kept of it.
        moments: site -> second moment (K, K) as `collect_moments` gives it, to round by GPTQ; empty to round to nearest.
    """
    source, prefix = job.source, job.source.architecture.block_prefix(index)
    block = {name: tensor.to(job.device, torch.float32) for name, tensor in source.block(index).items()}
    prepared = prepare_block(block, inputs, job.recipe, source.architecture, job.basis, job.plan.linears["down"])
    turned = {site: prepared.moment(site, moment) for site, moment in moments.items()}
    stored = {prefix + name: tensor for name, tensor in _round_block(prepared, turned, job.plan, prefix).items()}
    for norm, rotation in prepared.rotations.items():
        stored[f"{prefix}{norm}.rotation"] = rotation.half()
    linear_weights = {f"{module}.{part}" for module in LINEARS.values() for part in ("weight", "bias")}
    for name, tensor in prepared.block.items():
        if name not in linear_weights:
            stored[prefix + name] = tensor.to(source.dtype)
    return stored


def _round_block(prepared: PreparedBlock, moments: dict[str, torch.Tensor], plan: Plan, prefix: str) -> dict[str, torch.Tensor]:
    stored = {}
    for role, module in LINEARS.items():
        weight, site = prepared.block[f"{module}.weight"], SITE_OF[role]
        order = prepared.orders[site].to(weight.device) if site in prepared.orders else None
        try:
            tensors = quantize_linear(weight, plan.linears[role], order, moments.get(site))
        except ValueError as error:
            raise ValueError(f"{prefix}{module}: {error}") from error
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
    config.quantization_config = quantization_config(plan, report.recipe, report.calibration)
    companions = [part for part in (source.tokenizer, source.generation_config) if part is not None]
    writer.finish(config, {"report": vars(report)}, {"README.md": model_card(source, report)}, companions)


def _biases(source: Source) -> frozenset[str]:
    prefix = source.architecture.block_prefix(0)
    return frozenset(role for role, module in LINEARS.items() if f"{prefix}{module}.bias" in source.tensors)
