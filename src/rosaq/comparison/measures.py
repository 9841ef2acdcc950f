"""A model's figures, task by task, with what the tasks share kept between models."""

from typing import Any

from rosaq.calibration import windows_hash
from rosaq.clock import Clock, Progress
from rosaq.comparison.experiment import PERPLEXITY, Experiment
from rosaq.evaluation.perplexity import divergence, perplexity, read_wikitext2, text_windows
from rosaq.evaluation.zeroshot import Suite

COLUMNS = {
    "piqa": "PIQA", "winogrande": "WinoGrande", "hellaswag": "HellaSwag", "arc_easy": "ARC-e", "arc_challenge": "ARC-c", "commonsense_qa": "CSQA",
    "openbookqa": "OBQA", "csr": "average", "mmlu_humanities": "MMLU humanities", "mmlu_social_sciences": "MMLU social", "mmlu_stem": "MMLU STEM",
    "mmlu_other": "MMLU other", "mmlu": "MMLU average",
}  # fmt: skip


class Measures:
    """Evaluates models on an experiment's tasks.

    Raises:
        ValueError: the tasks' data is not there; before anything is quantized.
    """

    def __init__(self, experiment: Experiment, tokenizer: Any) -> None:
        """Read what the tasks need."""
        if tokenizer is None:
            raise ValueError(f"{experiment.model}: no tokenizer, so no text can be predicted")
        self._documents = experiment.documents
        self._suites = {task: Suite((task,), tokenizer, experiment.data) for task in experiment.tasks if task != PERPLEXITY}
        if PERPLEXITY in experiment.tasks:
            self._windows = text_windows(read_wikitext2(experiment.data), tokenizer, experiment.window)[: experiment.windows]

    def run(self, model: Any, tasks: tuple[str, ...], clock: Clock, progress: Progress, reference: Any = None) -> dict[str, Any]:
        """Figures with standard errors by task, JSON-able; `clock` takes the time of each; divergence where there is a reference."""
        figures: dict[str, Any] = {}
        if PERPLEXITY in tasks:
            with clock("perplexity"):
                if reference is None:
                    result = perplexity(model, self._windows, progress).to_dict()
                else:
                    beside = divergence(model, reference, self._windows, progress)
                    result = {**beside.model.to_dict(), "kl_divergence": beside.kl_divergence, "top1_agreement": beside.top1_agreement}
            figures[PERPLEXITY] = {**result, "windows_sha256": windows_hash(self._windows)}
        for task in tasks:
            if task != PERPLEXITY:
                with clock(task):
                    scores = self._suites[task].run(model, self._documents, progress=progress)
                figures[task] = scores.to_dict()
        return figures


def task_figures(results: dict[str, Any]) -> list[tuple[str, float, float | None]]:
    """The columns that a cell's results give beside perplexity: (name, percent, standard error in percent)."""
    found = []
    for task in ("csr", "mmlu"):
        if task in results:
            scores, averages = results[task]["tasks"], results[task]["averages"]
            found += [(COLUMNS[name], scores[name]) for name in scores if name in COLUMNS]
            found += [(COLUMNS[name], averages[name]) for name in COLUMNS if name in averages]
    return [(column, 100 * entry["accuracy"], _percent(entry["standard_error"])) for column, entry in found]


def _percent(share: float | None) -> float | None:
    return None if share is None else 100 * share
