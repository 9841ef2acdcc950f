"""One process on one device: each cell that no other has is quantized, evaluated from its packed checkpoint, and kept.

What many cells share is paid for once: the opened model, its statistics (and whole second moments, where memory
allows), the tokenized text, the built tasks.
"""

import os
import platform
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from importlib import metadata
from typing import Any

import torch

from rosaq.checkpoint import MANIFEST
from rosaq.clock import Clock, Progress, no_progress, peak_memory
from rosaq.comparison.experiment import Cell
from rosaq.comparison.measures import Measures
from rosaq.comparison.results import Results
from rosaq.engines.dense import is_packed
from rosaq.engines.loading import load_model, resolve_dtype
from rosaq.learned import learning_key
from rosaq.moments import Flow
from rosaq.pipeline import quantize
from rosaq.run import Means
from rosaq.safetensors_folder import read_json
from rosaq.skeleton import full_model
from rosaq.source import Source
from rosaq.statistics import Statistics, measure, moments_fit, placed
from rosaq.version import __version__

HELD_BYTES = 8 * 10**9  # a model that takes no more than this in float32 is read once and kept, its statistics are shared through a file
POLL_SECONDS = 0.5
FRESH = Means(force=True)  # a cell is quantized as a whole or not at all, and never goes on with what another has left

Announce = Callable[[str], None]


def say_nothing(line: str) -> None:
    """Announce nothing."""


class Worker:
    """Goes through the cells on one device."""

    def __init__(
        self,
        results: Results,
        source: Source,
        measures: Measures,
        device: str,
        rank: int = 0,
        announce: Announce = say_nothing,
        progress: Progress = no_progress,
    ) -> None:
        """Hold what the cells share; `rank` tells workers apart, so that they begin with different seeds."""
        self.results, self.experiment, self.measures, self.device = results, results.experiment, measures, device
        self.rank, self.announce, self.progress = rank, announce, progress
        self.in_memory = 4 * source.parameters() <= HELD_BYTES
        self.source = replace(source, tensors={name: source.tensors[name] for name in source.tensors}) if self.in_memory else source
        self.statistics: Statistics | None = None
        self.seed: int | None = None
        self.reference: Any = None

    def run(self) -> None:
        """Measure cells until all are finished or have failed, by this process or another."""
        while ahead := self._ahead():
            if not any(self._try(cell) for cell in ahead):
                time.sleep(POLL_SECONDS)  # others are at work on what is left; should one die, its cell is free

    def _ahead(self) -> list[Cell]:
        """Cells to do, those with the most tasks first, then those whose statistics are held."""
        seeds = self.experiment.seeds
        cells = [cell for cell in self.experiment.cells() if self.results.missing(cell) and not self.results.failure(cell)]

        def rank(cell: Cell) -> tuple[int, bool, int]:
            turn = -1 if cell.seed is None else (seeds.index(cell.seed) - self.rank) % len(seeds)
            return -len(cell.tasks), cell.seed is not None and cell.seed != self.seed, turn

        return sorted(cells, key=rank)

    def _try(self, cell: Cell) -> bool:
        """Measure a cell unless another process holds it, or learns the rotations that it needs; whether something was done."""
        with self.results.claim(cell) as mine, self.results.learning(cell) as free:
            tasks = self.results.missing(cell) if mine and free else ()
            if not tasks:
                return False
            try:
                self._measure(cell, tasks)
            except (ValueError, RuntimeError, OSError) as error:  # the other cells are worth having
                why = str(error).splitlines()[0] if str(error) else repr(error)
                self.results.fail(cell, why)
                self.announce(f"{cell.name}: failed: {why}")
            return True

    def _measure(self, cell: Cell, tasks: tuple[str, ...]) -> None:
        clock, begun = Clock(self.device), time.perf_counter()
        if self.device.startswith("cuda"):
            torch.cuda.init()  # the statistics of a device that nothing has touched yet cannot be reset
            torch.cuda.reset_peak_memory_stats(self.device)
        with self._model(cell, clock) as (model, facts):
            reference = self._original(clock) if self.experiment.divergence and cell.recipe is not None else None
            figures = self.measures.run(model, tasks, clock, self.progress, reference)
            form = "packed" if is_packed(model) else "dense"
        host, device = peak_memory(self.device)
        run = {
            "tasks": tasks, "seconds": {**clock.seconds, "whole cell": round(time.perf_counter() - begun, 3)},
            "peak_host_bytes": host, "peak_device_bytes": device, "versions": versions(), "hardware": hardware(self.device), "weights": form,
        }  # fmt: skip
        earlier = self.results.read(cell) or {"figures": {}, "runs": []}
        values = {**facts, "figures": {**earlier["figures"], **figures}, "runs": [*earlier["runs"], run]}
        self.results.write(cell, values)
        perplexity = f"perplexity {figures['wikitext2']['perplexity']:.4f}, " if "wikitext2" in figures else ""
        self.announce(f"{cell.name} on {self.device}: {perplexity}{run['seconds']['whole cell']:.1f} s")  # type: ignore[index]

    @contextmanager
    def _model(self, cell: Cell, clock: Clock) -> Iterator[tuple[Any, dict[str, Any]]]:
        """The model to evaluate, and what its cell says of it."""
        if cell.recipe is None:
            yield self._original(clock), {"recipe": None, "bits": 16, "bits_per_weight": 16.0, "seed": None, "calibration": None}
            return
        if cell.checkpoint is not None:
            with clock("loading"):
                model, _ = load_model(str(cell.checkpoint), self.device, self.experiment.dtype, weights="auto")
                manifest = read_json(cell.checkpoint / MANIFEST)
            made = {key: manifest["report"][key] for key in ("recipe", "bits_per_weight", "checkpoint_bytes", "calibration")}
            yield model, {**made, "bits": cell.recipe.bits, "seed": cell.seed, "distillation": manifest.get("distillation")}
            return
        statistics, key = self._statistics(cell, clock), learning_key(cell.recipe)
        self._share_moments(cell, statistics, clock)
        if key not in statistics.learned and (learned := self.results.read_learned(cell)):
            statistics.learned[key] = learned
        with self.results.checkpoint(cell) as place:
            report = quantize(self.source, place, cell.recipe, statistics, self.device, self.progress, FRESH)
            if key in statistics.learned:
                self.results.write_learned(cell, statistics.learned[key])
            clock.seconds.update({f"quantize: {stage}": seconds for stage, seconds in report.seconds.items()})
            with clock("loading"):
                model, _ = load_model(str(place), self.device, self.experiment.dtype, weights="auto")
            distilled = read_json(place / MANIFEST).get("distillation") if cell.recipe.distillation_windows else None
            yield model, {
                "recipe": cell.recipe.to_dict(), "bits": cell.recipe.bits, "bits_per_weight": report.bits_per_weight,
                "checkpoint_bytes": report.checkpoint_bytes, "seed": cell.seed, "calibration": report.calibration, "distillation": distilled,
            }  # fmt: skip

    def _original(self, clock: Clock) -> Any:
        """The original model; it stays loaded where every cell is compared with it."""
        if self.reference is not None:
            return self.reference
        with clock("loading"):
            dtype = resolve_dtype(self.experiment.dtype, self.source.dtype, torch.float32, self.device)
            model = full_model(self.source, dtype, self.device)
        self.reference = model if self.experiment.divergence else None
        return model

    def _statistics(self, cell: Cell, clock: Clock) -> Statistics:
        """The seed's statistics, measured unless they are held or another process has; one seed's are held at a time."""
        assert cell.seed is not None and cell.recipe is not None
        if self.statistics is None or cell.seed != self.seed:
            self.statistics = None
            with self.results.statistics(cell.seed) if self.in_memory else nullcontext() as statistics:
                if statistics is None:
                    statistics = measure(self.source, self.experiment.calibrated(cell.seed), self.device, self.progress, clock)
                    if self.in_memory:
                        self.results.write_statistics(cell.seed, statistics)
            statistics.hold = moments_fit(self.source)
            self.statistics, self.seed = statistics, cell.seed
        return self.statistics

    def _share_moments(self, cell: Cell, statistics: Statistics, clock: Clock) -> None:
        """Hold the whole second moments that a recipe needs, one pass for all processes; weighted ones are left to the recipe that weighs."""
        recipe, seed = cell.recipe, cell.seed
        assert recipe is not None and seed is not None
        sink = recipe.sink_weight
        wanted = recipe.needs_moments and recipe.token_weights == "equal"
        if not (wanted and self.in_memory and statistics.hold) or statistics.moments(sink) is not None:
            return
        with self.results.moments(seed, sink) as found, clock("moments"):
            if found is not None:
                statistics.hold_moments(sink, found)
                return
            flow = placed(Flow(sink_weight=sink, clock=clock), self.source, statistics.windows, self.device, second_pass=True)
            for _ in statistics.second_moments(self.source, self.device, flow):
                pass  # they are held
            collected = statistics.moments(sink)
            assert collected is not None
            self.results.write_moments(seed, sink, collected)


def versions() -> dict[str, str]:
    """Versions of what the figures depend on."""
    found = {"python": platform.python_version(), "rosaq": __version__}
    for name in ("torch", "transformers", "lm_eval"):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found


def hardware(device: str) -> dict[str, Any]:
    """What the cell ran on."""
    found: dict[str, Any] = {"device": device, "machine": platform.machine(), "cores": os.cpu_count(), "threads": torch.get_num_threads()}
    if device.startswith("cuda"):
        found |= {"gpu": torch.cuda.get_device_name(device), "cuda": torch.version.cuda}
    return found
