"""Zero-shot accuracy by lm-evaluation-harness: its tasks, prompts, metrics and standard errors, on our loaded models."""

import logging
import math
from array import array
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import cache, partial
from importlib.metadata import version
from pathlib import Path
from typing import Any
from unittest.mock import patch

from rosaq.clock import Progress, no_progress
from rosaq.evaluation.tasks import CSR, TASKS, HarnessTasks, Task, chosen_tasks, rows_file


@dataclass(frozen=True)
class TaskScore:
    """Accuracy on one task, or on one subject of MMLU, as shares with the harness's standard errors.

    Attributes:
        metric: "acc" or "acc_norm", the one that counts.
        questions: how many were asked.
        acc: share of questions whose right answer is the likeliest.
        acc_stderr: its standard error; NaN for a single question.
        acc_norm: the same by log-likelihood over the bytes of the answer; None where the harness defines none.
        acc_norm_stderr: its standard error.
    """

    metric: str
    questions: int
    acc: float
    acc_stderr: float
    acc_norm: float | None
    acc_norm_stderr: float | None

    @property
    def accuracy(self) -> float:
        """The figure that counts."""
        return self.acc_norm if self.metric == "acc_norm" and self.acc_norm is not None else self.acc

    @property
    def standard_error(self) -> float:
        """Of `accuracy`."""
        return self.acc_norm_stderr if self.metric == "acc_norm" and self.acc_norm_stderr is not None else self.acc_stderr


@dataclass(frozen=True)
class Average:
    """Mean accuracy over several tasks, its standard error from theirs, and the questions behind it."""

    accuracy: float
    standard_error: float
    questions: int


@dataclass(frozen=True)
class ZeroShotResult:
    """What `zero_shot` measured.

    Attributes:
        tasks: score of each task; MMLU's subjects are under the harness's names, "mmlu_anatomy" and so on.
        averages: "csr" is the plain mean over its seven tasks; "mmlu", "mmlu_humanities", "mmlu_social_sciences",
            "mmlu_stem" and "mmlu_other" are means over questions, subjects weighted by their size, as the harness has it.
            Only averages that are whole are there.
        limit: questions per task (and per subject) at most; None for all.
        source: "hub", or the data folder.
        harness: version of lm-evaluation-harness.
    """

    tasks: dict[str, TaskScore]
    averages: dict[str, Average]
    limit: int | None
    source: str
    harness: str

    def to_dict(self) -> dict[str, Any]:
        """All fields, JSON-able; each task also has the accuracy that counts and its standard error."""
        counted = {name: {"accuracy": score.accuracy, "standard_error": score.standard_error, **asdict(score)} for name, score in self.tasks.items()}
        return {**asdict(self), "tasks": counted}


def zero_shot(
    model: Any,
    tokenizer: Any,
    tasks: Sequence[str] = ("csr", "mmlu"),
    data: Path | None = None,
    limit: int | None = None,
    batch_tokens: int | None = None,
    progress: Progress = no_progress,
) -> ZeroShotResult:
    """Zero-shot accuracy of a loaded causal language model: no examples, no chat template.

    Args:
        model: transformers model in evaluation mode on its device, plain or with quantized layers.
        tokenizer: its tokenizer.
        tasks: names of `rosaq.evaluation.tasks.NAMES`: "csr", "mmlu", or single tasks of "csr".
        data: folder with the files of `rosaq.evaluation.tasks.TASKS`; None reads the hub.
        limit: only the first so many questions of each task, and of each of MMLU's 57 subjects.
        batch_tokens: padded tokens per forward pass; by default 32768 on a GPU and 4096 on the CPU.
        progress: told of the requests that are done.

    Raises:
        ValueError: an unknown task, lm-evaluation-harness is not installed, a file of the folder is missing or not as
            it should be, or the hub does not answer.
    """
    return Suite(tasks, tokenizer, data).run(model, limit, batch_tokens, progress)


class Suite:
    """Tasks that any number of models with one tokenizer are asked; rows and token ids are kept from model to model.

    Args:
        tasks: as for `zero_shot`.
        tokenizer: of the models.
        data: as for `zero_shot`.

    Raises:
        ValueError: as `check_zero_shot`.
    """

    def __init__(self, tasks: Sequence[str], tokenizer: Any, data: Path | None) -> None:
        """Check; the rows are read when the first model is asked."""
        self._chosen, self._tokenizer, self._data = check_zero_shot(tasks, data), tokenizer, data
        self._questions: HarnessTasks | None = None
        self._ids: dict[str, array[int]] = {}

    def run(self, model: Any, limit: int | None = None, batch_tokens: int | None = None, progress: Progress = no_progress) -> ZeroShotResult:
        """Ask one model; arguments and errors as for `zero_shot`."""
        if limit is not None and limit < 1:
            raise ValueError(f"limit is {limit}; it must be at least 1")
        from lm_eval.evaluator import evaluate  # noqa: PLC0415  (an optional dependency)

        from rosaq.evaluation.likelihood import LikelihoodModel  # noqa: PLC0415

        with _quiet_harness():
            self._questions = questions = self._questions or HarnessTasks(self._chosen, self._data)
            asked = LikelihoodModel(model, self._tokenizer, batch_tokens, progress, self._ids)
            found = evaluate(asked, questions.loaded, limit=limit, log_samples=False)
        assert found is not None
        scores = {name: _score(name, found["results"][name]) for name in questions.loaded["tasks"]}
        averages = _averages(self._chosen, scores, questions.categories)
        return ZeroShotResult(scores, averages, limit, "hub" if self._data is None else str(self._data), version("lm-eval"))


def check_zero_shot(tasks: Sequence[str], data: Path | None) -> tuple[Task, ...]:
    """Refuse, before a model is loaded, what `zero_shot` would refuse after.

    Returns:
        The tasks that the names stand for.

    Raises:
        ValueError: an unknown task, lm-evaluation-harness is not installed, or the folder lacks a file.
    """
    chosen = chosen_tasks(tasks)
    try:
        import datasets  # noqa: F401, PLC0415  (optional dependencies)
        import lm_eval  # noqa: F401, PLC0415
    except ImportError as error:
        raise ValueError(f"zero-shot tasks need lm-evaluation-harness: pip install 'rosaq[eval]' ({error})") from error
    if data is not None:
        for task in chosen:
            rows_file(data, task)
    return chosen


def _score(name: str, figures: dict[str, Any]) -> TaskScore:
    def stderr(metric: str) -> float:
        value = figures[f"{metric}_stderr,none"]
        return math.nan if value == "N/A" else float(value)

    normed = "acc_norm,none" in figures
    return TaskScore(
        metric=TASKS[name].metric if name in TASKS else "acc",
        questions=figures["sample_len"],
        acc=float(figures["acc,none"]),
        acc_stderr=stderr("acc"),
        acc_norm=float(figures["acc_norm,none"]) if normed else None,
        acc_norm_stderr=stderr("acc_norm") if normed else None,
    )


def _averages(chosen: Sequence[Task], scores: dict[str, TaskScore], categories: dict[str, list[str]]) -> dict[str, Average]:
    averages = {}
    if set(CSR) <= set(chosen):
        averages["csr"] = _average([scores[task.name] for task in CSR], weighted=False)
    if categories:
        averages["mmlu"] = _average([scores[name] for names in categories.values() for name in names], weighted=True)
    for category, names in categories.items():
        averages[category] = _average([scores[name] for name in names], weighted=True)
    return averages


def _average(scores: list[TaskScore], weighted: bool) -> Average:
    """Mean over tasks or, weighted, over questions, by the harness's own formulas for a group."""
    from lm_eval.api.metrics import aggregate_subtask_metrics, pooled_sample_stderr, unweighted_mean_stderr  # noqa: PLC0415

    sizes, errors = [score.questions for score in scores], [score.standard_error for score in scores]
    mean = aggregate_subtask_metrics([score.accuracy for score in scores], sizes, weighted)
    if any(math.isnan(error) for error in errors):
        error = math.nan
    else:
        error = pooled_sample_stderr(errors, sizes) if weighted else unweighted_mean_stderr(errors)
    return Average(float(mean), float(error), sum(sizes))


@contextmanager
def _quiet_harness() -> Iterator[None]:
    """The harness without its bars and advice, and with each prompt template compiled once instead of once a question.

    Compiling the same few templates 300,000 times takes longer than a small model's answers; nothing else changes.
    """
    import datasets  # noqa: PLC0415  (optional dependencies, checked by the caller)
    import lm_eval.api.task  # noqa: PLC0415
    import lm_eval.utils  # noqa: PLC0415

    logger, bars = logging.getLogger("lm_eval"), datasets.are_progress_bars_disabled()
    level = logger.level
    logger.setLevel(logging.ERROR)
    datasets.disable_progress_bars()
    silent = patch.object(lm_eval.api.task, "tqdm", partial(lm_eval.api.task.tqdm, disable=True))
    compiled = patch.object(lm_eval.utils.env, "from_string", cache(lm_eval.utils.env.from_string))
    try:
        with silent, compiled:
            yield
    finally:
        logger.setLevel(level)
        if not bars:
            datasets.enable_progress_bars()
