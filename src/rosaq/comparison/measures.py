"""A model's figures, task by task, with what the tasks share kept between models."""

from typing import Any

from rosaq.calibration import windows_hash
from rosaq.clock import Clock, Progress
from rosaq.comparison.experiment import PERPLEXITY, Experiment
from rosaq.evaluation.perplexity import perplexity, read_wikitext2, text_windows


class Measures:
    """Evaluates models on an experiment's tasks.

    Raises:
        ValueError: the tasks' data is not there; before anything is quantized.
    """

    def __init__(self, experiment: Experiment, tokenizer: Any) -> None:
        """Read what the tasks need."""
        if tokenizer is None:
            raise ValueError(f"{experiment.model}: no tokenizer, so no text can be predicted")
        if PERPLEXITY in experiment.tasks:
            self._windows = text_windows(read_wikitext2(experiment.data), tokenizer, experiment.window)[: experiment.windows]

    def run(self, model: Any, tasks: tuple[str, ...], clock: Clock, progress: Progress) -> dict[str, Any]:
        """Figures with standard errors by task, JSON-able; `clock` takes the time of each."""
        figures: dict[str, Any] = {}
        if PERPLEXITY in tasks:
            with clock("perplexity"):
                result = perplexity(model, self._windows, progress).to_dict()
            figures[PERPLEXITY] = {**result, "windows_sha256": windows_hash(self._windows)}
        return figures


def task_figures(results: dict[str, Any]) -> list[tuple[str, float, float | None]]:
    """The columns that a cell's results give beside perplexity: (name, percent, standard error)."""
    return []
