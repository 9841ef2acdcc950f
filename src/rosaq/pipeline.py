"""The method in order, one call a stage; reads like the paper's algorithm (ROSAQ section 4, arXiv:2506.13472)."""

import copy
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from rosaq.allocation import allocate
from rosaq.architecture import EMBEDDING, FINAL_NORM, HEAD
from rosaq.calibration import Calibration
from rosaq.card import CHANNELS, Pictures, model_card
from rosaq.channel_picture import channel_picture
from rosaq.checkpoint import check_published, finish_checkpoint, published_recipe, quantization_config
from rosaq.clock import Clock, Progress, no_progress, peak_memory
from rosaq.device import resolve_device
from rosaq.distillation import Settings, distill
from rosaq.distributed import current_ranks
from rosaq.job import Job, find_bases, quantize_block, quantize_table
from rosaq.learned import Learned, learning_key
from rosaq.memory import device_bound
from rosaq.moments import Flow
from rosaq.plan import make_plan
from rosaq.recipe import Recipe, load_recipe
from rosaq.results import Results, block_part, checkpoint_parts
from rosaq.run import Means, Report, Run
from rosaq.source import Source, open_source
from rosaq.statistics import Statistics, calibration_record, measure_durably, read_windows
from rosaq.workfolder import WorkFolder, check_destination

LEARNED = "rotations-learned"  # record of rotations that were learned, which takes long
WEIGHTS = "token-weights"  # record of what each token counts, where the recipe wants gradients
ALLOCATION = "allocation-found"  # record of the forms of all sites, where the recipe has a target


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
        plan = make_plan(recipe, source.architecture, source.biases())
        checkpoint_parts(source, plan)  # refuses what is wrong with the model's tensors
    run = Run(source, recipe, plan, device, current_ranks(), clock, progress)
    settings, windows = run.settings(calibration)
    _check_distillation(run, settings, means)
    with WorkFolder(destination, run.identity(settings), run.ranks, means.force) as work, device_bound(device, means.max_device_memory):
        if windows is None:
            assert isinstance(calibration, Calibration)
            windows = run.sampled(calibration, work)
        if run.ranks.first and work.distilled.is_dir():
            work.place()
        run.ranks.wait()
        if work.published:
            report = _published(run, work, settings, windows)
        else:
            flows = run.flows(windows, means, work.path)
            measured = calibration if isinstance(calibration, Statistics) else None
            report = _make(run, work, flows, settings, measured or windows)
            report.activations = flows[1].place
    report.peak_host_bytes, report.peak_device_bytes = peak_memory(device)
    return report


def _published(run: Run, work: WorkFolder, settings: dict[str, Any], windows: torch.Tensor) -> Report:
    """The report of a checkpoint that has its name already; what is left of the work is removed."""
    if allocation := published_recipe(work).get("allocation", ""):
        run = run.allocated(allocation)
    report = run.report(settings, windows)
    report.learning = check_published(work, report.lasting()).get("learning", {})
    if run.ranks.first:
        work.publish()
    return report


def _make(run: Run, work: WorkFolder, flows: tuple[Flow, Flow], settings: dict[str, Any], calibration: Statistics | torch.Tensor) -> Report:
    """The stages, each durable: measure, rotate, take gradients, allocate where there is a target, round, write, distil.

    The second flow is of passes backward.
    """
    first, waits = run.ranks.first, run.recipe.target_bits and not run.recipe.allocation
    flow, backward = flows
    results = None if waits else _laid_out(run, work)
    statistics = calibration if isinstance(calibration, Statistics) else _measured(run, work, flow, settings, calibration)
    with run.clock("learning" if run.recipe.rotation == "learned" else "rotation"):
        job = _make_job(run, work, statistics)
    if job.recipe.token_weights == "gradient":
        with job.clock("gradients"):
            weights = _token_weights(job, work, backward, statistics)
            flow, backward = replace(flow, weights=weights), replace(backward, weights=weights)
    if results is None:
        with job.clock("allocation"):
            job = job.allocated(_allocation(job, work, backward, statistics))
            results = _laid_out(job, work)
    report = job.report(settings, statistics.windows)
    report.learning = job.bases.learning
    with job.clock("rounding"):
        report.resumed_blocks = _round_blocks(job, statistics, results, flow)
    with job.clock("writing"):
        work.settle()
    with job.clock("tables"):
        _round_tables(job, results)
        work.settle()
    with job.clock("writing"):
        job.ranks.wait()
        if first:
            _finish(work, results, job, report, _pictures(job, statistics))
    with job.clock("distillation") if job.recipe.distillation_windows else nullcontext():
        if first and job.recipe.distillation_windows:
            _distill(job, work, settings)
    with job.clock("writing"):
        if first:
            work.publish()
        job.ranks.wait()
    return report


def _check_distillation(run: Run, settings: dict[str, Any], means: Means) -> None:
    """Refuse at once what distillation would refuse at the end."""
    recipe = run.recipe
    if not recipe.distillation_windows:
        return
    if means.max_memory is not None:
        raise ValueError(f"recipe {recipe.name!r}: distillation holds the whole model, which max-memory is there to avoid; give one or the other")
    if not {"text", "seed"} <= set(settings):
        raise ValueError(f"recipe {recipe.name!r}: distillation reads more text than the calibration windows; give a text instead of token ids")
    text, training = _distillation(recipe, settings)
    if run.ranks.first and text.text != "self":
        with run.clock("text"):
            read_windows(run.source, replace(text, samples=text.samples + training.held_out), run.device, run.progress)


def _distillation(recipe: Recipe, settings: dict[str, Any]) -> tuple[Calibration, Settings]:
    """The text that a recipe trains on, and how."""
    training = Settings(epochs=recipe.distillation_epochs)
    if recipe.distillation_windows < training.batch:
        raise ValueError(f"recipe {recipe.name!r}: distillation_windows is {recipe.distillation_windows}; it must be {training.batch} or more")
    return Calibration(settings["text"], recipe.distillation_windows, settings["seq_len"], settings["seed"]), training


def _distill(run: Run, work: WorkFolder, settings: dict[str, Any]) -> None:
    """Train what the finished checkpoint keeps precise; the result lies beside it, to be published in its place."""
    distill(work.checkpoint, run.source, work.distilled, *_distillation(run.recipe, settings), run.device, run.progress)


def _laid_out(run: Run, work: WorkFolder) -> Results:
    """The shards, with all of their disk space taken."""
    results = Results(work, checkpoint_parts(run.source, run.plan))
    if run.ranks.first:
        results.create()
    run.ranks.wait()
    return results


def _measured(run: Run, work: WorkFolder, flow: Flow, settings: dict[str, Any], windows: torch.Tensor) -> Statistics:
    """What the calibration text leaves, durably."""
    with run.clock("activations"):
        inputs, residual = measure_durably(run.source, windows, run.recipe, run.device, work, flow, run.progress)
        return Statistics(calibration_record(settings, windows), inputs, windows, residual)


def _allocation(job: Job, work: WorkFolder, flow: Flow, statistics: Statistics) -> str:
    """The allocation for the recipe's target, found by the first rank or an earlier go."""
    found = None
    if job.ranks.first:
        found = work.noted(ALLOCATION)
        if found is None:
            found = {"allocation": allocate(job, statistics, flow, job.progress)}
            work.note(ALLOCATION, found)
    return str(job.ranks.agree(found)["allocation"])


def _token_weights(run: Run, work: WorkFolder, flow: Flow, statistics: Statistics) -> list[dict[str, torch.Tensor]]:
    """What each token counts, found by all ranks together, or by an earlier go."""
    if run.ranks.agree(statistics.weights is None and work.has(WEIGHTS)):
        statistics.weights = [{} for _ in range(run.source.architecture.layers)]
        for name, weights in work.load(WEIGHTS).items():
            statistics.weights[int(name.split(".")[0])][name.split(".")[1]] = weights
    found = run.weights(statistics, flow)
    if run.ranks.first and not work.has(WEIGHTS):
        work.save(WEIGHTS, {f"{index:05d}.{site}": each for index, sites in enumerate(found) for site, each in sites.items()})
    return found


def _pictures(job: Job, statistics: Statistics) -> Pictures:
    """What the model card shows: the rotation's effect, where one PCA turns the residual stream and a picture can be drawn."""
    if job.recipe.rotation != "global" or job.bases.residual is None:
        return Pictures({})
    salient = 0 if job.recipe.allocation else job.recipe.salient  # an allocation gives each site its own
    drawn = channel_picture(statistics.residual_moment(), job.bases.residual, salient)
    return Pictures({} if drawn is None else {CHANNELS: drawn})


def _make_job(run: Run, work: WorkFolder, statistics: Statistics) -> Job:
    """The recipe's job, with the first rank's bases, so that all have the same; what was learned is kept."""
    bases, learns = None, run.recipe.rotation == "learned"
    if run.ranks.first:
        if learns and work.has(LEARNED):
            statistics.learned[learning_key(run.recipe)] = Learned.from_tensors(work.load(LEARNED))
        bases = find_bases(run, statistics).to("cpu")
        if learns and not work.has(LEARNED):
            work.save(LEARNED, statistics.learned[learning_key(run.recipe)].tensors())
    return Job.of(run, run.ranks.agree(bases).to(run.device))


def _round_blocks(job: Job, statistics: Statistics, results: Results, flow: Flow) -> int:
    """Round the blocks that are not done yet, each rank its own; returns how many were done.

    Ranks take turns block by block. A rank rounds its block when all have run theirs of the turn: meanwhile it would
    keep the others waiting for its part of their moments.
    """
    layers, ranks, clock = job.source.architecture.layers, job.ranks, job.clock
    done = ranks.agree([results.done(block_part(index)) for index in range(layers)] if ranks.first else None)
    mine = [index for index in range(layers) if index % ranks.count == ranks.rank and not done[index]]
    blocks, turn = job.source.blocks(mine, job.device), []
    first = next((index for index in range(layers) if not done[index]), layers)
    for index, moments in enumerate(job.moments(statistics, replace(flow, start=first)), first):
        if index in mine:
            turn.append((index, moments))
        del moments
        if turn and (index % ranks.count == ranks.count - 1 or index == layers - 1):
            with clock("reading"):
                block = next(blocks)
            number, kept = turn.pop()
            stored = quantize_block(job, number, block, statistics.inputs[number], kept)
            del block, kept
            with clock("writing"):
                results.later(block_part(number), stored)
        job.progress("rounding", index + 1, layers)
    return sum(done)


def _round_tables(job: Job, results: Results) -> None:
    """Quantize what is outside the decoder blocks, each rank its own modules."""
    modules = [FINAL_NORM, EMBEDDING] if job.plan.tied else [FINAL_NORM, EMBEDDING, HEAD]
    for index, module in enumerate(modules):
        if index % job.ranks.count == job.ranks.rank and not results.done(module):
            results.later(module, quantize_table(job, module))


def _finish(work: WorkFolder, results: Results, run: Run, report: Report, pictures: Pictures) -> None:
    source, plan = run.source, run.plan
    config = copy.deepcopy(source.config)
    config.tie_word_embeddings = plan.tied
    config.dtype = source.dtype
    config.quantization_config = quantization_config(plan, report.recipe, report.calibration)
    companions = [part for part in (source.tokenizer, source.generation_config, pictures) if part is not None]
    texts = {"README.md": model_card(source, report, pictures)}
    finish_checkpoint(work, results.shards, config, {"report": report.lasting()}, texts, companions)
