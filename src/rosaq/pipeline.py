"""The method in order, one call a stage; reads like the paper's algorithm (ROSAQ section 4, arXiv:2506.13472)."""

import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch

from rosaq.architecture import EMBEDDING, FINAL_NORM, HEAD, LINEARS, SITE_OF
from rosaq.basis import PreparedBlock, prepare_block, residual_moment
from rosaq.calibration import Calibration
from rosaq.card import model_card
from rosaq.checkpoint import FORMAT_VERSION, check_published, finish_checkpoint
from rosaq.clock import Clock, Progress, no_progress, peak_memory
from rosaq.device import resolve_device
from rosaq.distributed import current_ranks
from rosaq.moments import BlockInputs, Flow, collect_moments
from rosaq.plan import Plan, make_plan
from rosaq.recipe import Recipe, load_recipe
from rosaq.results import Results, block_part, checkpoint_parts
from rosaq.rotation import Block, principal_basis
from rosaq.rounding.linear import quantize_linear
from rosaq.run import Means, Report, Run
from rosaq.source import Source, open_source
from rosaq.statistics import Statistics, calibration_record, compute_dtype, measure_durably
from rosaq.workfolder import WorkFolder, check_destination

ROWS = 1 << 12  # rows of a vocabulary table that are rotated and rounded at a time


def quantize(
    model: str | Source,
    output: str | Path,
    recipe: str | Recipe = "rosaq-int4",
    calibration: Calibration | Statistics | torch.Tensor | None = None,
    device: str = "auto",
    progress: Progress = no_progress,
    means: Means | None = None,
) -> Report:
    """Quantize a model into a checkpoint folder that transformers loads.

    A run that ends early, for whatever reason, leaves what it has done in `.NAME.partial` beside the output; the same
    call goes on from there and ends in the same bytes. With torch's default process group, its ranks share the work.

    Args:
        model: hub id, local folder, `.gguf` file, or an opened source.
        output: folder to make; it must not exist, or be empty.
        recipe: a `Recipe`, the name of a shipped one, or a `.toml` file.
        calibration: which text, and how much of it; by default 128 windows of 2048 tokens of the Pile. Or the
            statistics that `measure` made of it, to share them between recipes; or token ids (S, T) themselves.
        device: "auto" (a CUDA GPU where there is one), "cpu", "cuda" or "cuda:N".
        progress: called as (stage, done, total).
        means: bound on the memory; whether to start over.

    Returns:
        Sizes, times and memory of the run.

    Raises:
        ValueError: whatever is wrong with the model, the recipe, the text or the destination, or an earlier run with
            this output was another one; nothing is left behind under the output's name.
    """
    device, means, calibration = resolve_device(device), means or Means(), Calibration() if calibration is None else calibration
    recipe = load_recipe(recipe) if isinstance(recipe, str) else recipe
    destination, clock = Path(output).expanduser().absolute(), Clock(device)
    check_destination(destination)
    with clock("open"):
        source = open_source(model) if isinstance(model, str) else model
        plan = make_plan(recipe, source.architecture, _biases(source))
        parts = checkpoint_parts(source, plan)
    run = Run(source, recipe, plan, device, current_ranks(), clock, progress)
    settings, windows = run.settings(calibration)
    with WorkFolder(destination, run.identity(settings), run.ranks, means.force) as work:
        if windows is None:
            assert isinstance(calibration, Calibration)
            windows = run.sampled(calibration, work)
        settings.pop("statistics", None)
        sizes = (plan.bits_per_weight, plan.checkpoint_bytes, plan.original_bytes)
        report = Report(recipe.to_dict(), calibration_record(settings, windows), torch.device(device).type, *sizes, clock.seconds)
        if work.published:
            check_published(work, {"report": report.lasting()})
            if run.ranks.first:
                work.publish()
        else:
            flow = run.flow(windows, means, work.path)
            report.activations = flow.place
            _make(run, work, Results(work, parts), flow, report, calibration if isinstance(calibration, Statistics) else windows)
    report.peak_host_bytes, report.peak_device_bytes = peak_memory(device)
    return report


def _make(run: Run, work: WorkFolder, results: Results, flow: Flow, report: Report, calibration: Statistics | torch.Tensor) -> None:
    """The stages, each durable: measure, rotate, round, write."""
    first = run.ranks.first
    if first:
        results.create()
    run.ranks.wait()
    with run.clock("activations"):
        if isinstance(calibration, Statistics):
            inputs, windows = calibration.inputs, calibration.windows
            moment = residual_moment(inputs) if first and run.recipe.rotation == "global" else None
        else:
            windows = calibration
            inputs, moment = measure_durably(run.source, windows, run.recipe, run.device, work, flow, run.progress)
    with run.clock("rotation"):
        job = Job(run.source, run.recipe, run.plan, _residual_basis(run, moment), run.device, run.clock)
    with run.clock("rounding"):
        report.resumed_blocks = _round_blocks(run, job, inputs, windows, results, flow)
        _round_tables(run, job, results)
    with run.clock("writing"):
        work.settle()
        run.ranks.wait()
        if first:
            _finish(work, results, run, report)
        run.ranks.wait()


def _residual_basis(run: Run, moment: torch.Tensor | None) -> torch.Tensor | None:
    """The basis of the residual stream where it is one for all; the first rank's, so that all have the same."""
    if run.recipe.rotation != "global":
        return None
    hidden = run.source.architecture.hidden
    if run.ranks.first:
        assert moment is not None
        return run.ranks.tell(principal_basis(moment.to(run.device))[0].contiguous())
    return run.ranks.tell(torch.empty(hidden, hidden, dtype=torch.float64, device=run.device))


@dataclass(frozen=True)
class Job:
    """What every part of a model is quantized by.

    Attributes:
        source: the model.
        recipe: the recipe.
        plan: the recipe laid out over the model.
        basis: (D, D) of the residual stream where it is one for all, else None.
        device: where to compute.
        clock: takes the time of "preparing", which is everything before the rounding itself.
    """

    source: Source
    recipe: Recipe
    plan: Plan
    basis: torch.Tensor | None
    device: str
    clock: Clock = field(default_factory=Clock)


def _round_blocks(run: Run, job: Job, inputs: Sequence[BlockInputs], windows: torch.Tensor, results: Results, flow: Flow) -> int:
    """Round the blocks that are not done yet, each rank its own; returns how many were done.

    Ranks take turns block by block. A rank rounds its block when all have run theirs of the turn: meanwhile it would
    keep the others waiting for its part of their moments.
    """
    layers, ranks, clock = run.source.architecture.layers, run.ranks, run.clock
    done = ranks.agree([results.done(block_part(index)) for index in range(layers)] if ranks.first else None)
    mine = [index for index in range(layers) if index % ranks.count == ranks.rank and not done[index]]
    blocks, turn = run.source.blocks(mine, run.device), []
    first = next((index for index in range(layers) if not done[index]), layers)
    for index, moments in enumerate(_moments(job, windows, replace(flow, start=first)), first):
        if index in mine:
            turn.append((index, moments))
        del moments
        if turn and (index % ranks.count == ranks.count - 1 or index == layers - 1):
            with clock("reading"):
                block = next(blocks)
            number, kept = turn.pop()
            stored = quantize_block(job, number, block, inputs[number], kept)
            del block, kept
            with clock("writing"):
                results.later(block_part(number), stored)
        run.progress("rounding", index + 1, layers)
    return sum(done)


def _round_tables(run: Run, job: Job, results: Results) -> None:
    """Quantize what is outside the decoder blocks, each rank its own modules."""
    modules = [FINAL_NORM, EMBEDDING] if job.plan.tied else [FINAL_NORM, EMBEDDING, HEAD]
    for index, module in enumerate(modules):
        if index % run.ranks.count == run.ranks.rank and not results.done(module):
            stored = quantize_table(job, module)
            with run.clock("writing"):
                results.later(module, stored)


def _moments(job: Job, windows: torch.Tensor, flow: Flow) -> Iterator[dict[str, torch.Tensor]]:
    """Whole second moments of each block's sites where the rounding looks at them, by a second pass; else nothing."""
    if job.recipe.rounding == "gptq" and flow.start < job.source.architecture.layers:
        return collect_moments(job.source, windows, job.device, compute_dtype(job.source, job.device), flow)
    return iter([{}] * (job.source.architecture.layers - flow.start))


def quantize_block(job: Job, index: int, block: Block, inputs: BlockInputs, moments: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The stored tensors of one decoder block, by full name.

    Args:
        job: what to quantize by.
        index: of the block.
        block: the source's tensors.
        inputs: what calibration kept of it.
        moments: site -> second moment (K, K) as `collect_moments` gives it, to round by GPTQ; empty to round to nearest.
    """
    source, prefix = job.source, job.source.architecture.block_prefix(index)
    with job.clock("preparing"):
        exact = {name: tensor.to(job.device, torch.float32) for name, tensor in block.items()}
        prepared = prepare_block(exact, inputs, job.recipe, source.architecture, job.basis, job.plan.linears["down"])
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


def quantize_table(job: Job, module: str) -> dict[str, torch.Tensor]:
    """Embedding, final norm or lm_head: rotated with the residual stream, at 8 bits where the plan says so."""
    source, basis = job.source, job.basis
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


def _finish(work: WorkFolder, results: Results, run: Run, report: Report) -> None:
    source, plan = run.source, run.plan
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
    companions = [part for part in (source.tokenizer, source.generation_config) if part is not None]
    finish_checkpoint(work, results.shards, config, {"report": report.lasting()}, {"README.md": model_card(source, report)}, companions)


def _biases(source: Source) -> frozenset[str]:
    prefix = source.architecture.block_prefix(0)
    return frozenset(role for role, module in LINEARS.items() if f"{prefix}{module}.bias" in source.tensors)
