"""All cells of a comparison: by this process, or by one process per device; and again, where an earlier run stopped."""

import multiprocessing
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers.utils import logging

from rosaq.clock import Progress, no_progress
from rosaq.comparison.experiment import Cell, Experiment
from rosaq.comparison.measures import Measures
from rosaq.comparison.results import Results
from rosaq.comparison.worker import POLL_SECONDS, Announce, Worker, say_nothing
from rosaq.device import resolve_device
from rosaq.plan import make_plan
from rosaq.source import open_source


def compare(
    experiment: Experiment,
    folder: Path,
    devices: tuple[str, ...] = ("auto",),
    keep: bool = False,
    announce: Announce = say_nothing,
    progress: Progress = no_progress,
) -> list[tuple[Cell, dict[str, Any]]]:
    """Measure every cell that is not there yet; several processes may do so in one folder at once.

    Args:
        experiment: what to compare.
        folder: of the results; made, or gone on with.
        devices: one process for each; with one device, this process.
        keep: leave the checkpoints in `folder/checkpoints`.
        announce: told one line for each finished cell; picklable where there are several devices.
        progress: called as (stage, done, total).

    Returns:
        The cells and what was measured, in the order of the table.

    Raises:
        ValueError: a recipe that the model cannot have, a folder of another comparison, or cells that failed.
    """
    devices = tuple(resolve_device(device) for device in devices)
    source, cells = open_source(experiment.model), experiment.cells()
    for cell in cells:
        if cell.recipe is not None:
            make_plan(cell.recipe, source.architecture)
    results = Results(folder, experiment, source, keep)
    if any(results.missing(cell) for cell in cells):
        results.forget_failures()
        measures = Measures(experiment, source.tokenizer)
        if len(devices) == 1:
            Worker(results, source, measures, devices[0], 0, announce, progress).run()
        else:
            del measures  # only to refuse missing data before any process starts

            def tick() -> None:
                progress("cells", sum(not results.missing(cell) for cell in cells), len(cells))

            _spread(_Task(experiment, folder, keep, announce), devices, tick)
    failed = [f"{cell.name}: {why}" for cell in cells if (why := results.failure(cell))]
    if failed:
        raise ValueError(f"{len(failed)} of {len(cells)} cells failed, the others are kept; {'; '.join(failed)}")
    finished = [(cell, _finished(results, cell)) for cell in cells]
    results.forget_statistics()
    return finished


def _finished(results: Results, cell: Cell) -> dict[str, Any]:
    found = results.read(cell)
    if found is None or results.missing(cell):
        raise ValueError(f"{results.folder}: cell {cell.name} is not finished, because its process died; the same command goes on with it")
    return found


@dataclass(frozen=True)
class _Task:
    """What a process of its own is given."""

    experiment: Experiment
    folder: Path
    keep: bool
    announce: Announce


def _spread(task: _Task, devices: tuple[str, ...], tick: Callable[[], None]) -> None:
    """One process a device, each taking the next cell that none has; those left do the work of one that died."""
    context = multiprocessing.get_context("spawn")
    workers = [context.Process(target=_work, args=(task, device, rank)) for rank, device in enumerate(devices)]
    try:
        for worker in workers:
            worker.start()
        while any(worker.is_alive() for worker in workers):
            tick()
            time.sleep(POLL_SECONDS)
        tick()
    finally:
        for worker in workers:
            if worker.pid is not None:
                worker.terminate()
                worker.join()


def _work(task: _Task, device: str, rank: int) -> None:
    """A process of its own for one device."""
    logging.disable_progress_bar()  # transformers' own; a line for each finished cell tells more
    try:
        source = open_source(task.experiment.model)
        results, measures = Results(task.folder, task.experiment, source, task.keep), Measures(task.experiment, source.tokenizer)
        Worker(results, source, measures, device, rank, task.announce).run()
    except ValueError as error:
        task.announce(f"{device}: {error}")
        sys.exit(1)
