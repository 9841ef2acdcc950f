"""The zero-shot tasks as data, and the harness's objects for them with their rows from the hub or from a folder.

Seven tasks of common-sense reasoning ("csr") and MMLU. The harness's own task configurations are used as they are; a
folder of JSON Lines files with the rows that the hub has only changes where the rows come from.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from rosaq.text_files import read_entries


@dataclass(frozen=True)
class Task:
    """A data set as the harness knows it.

    Attributes:
        name: the harness's task.
        metric: "acc" or "acc_norm", what counts in the average.
        file: name of its rows in a data folder.
        split: the harness's split that they are.
        fields: what each row must have.
        folder: of the task's configuration among the harness's tasks.
    """

    name: str
    metric: str
    file: str
    split: str
    fields: tuple[str, ...]
    folder: str


# Which metric counts: acc_norm (log-likelihood over the bytes of the answer) where the harness defines it, since answers
# of different lengths are compared there; acc where only that is defined, since the scored text is the same for both
# answers (WinoGrande) or one letter (CommonsenseQA, MMLU). Both are reported.
_QUESTION = ("question", "choices", "answerKey")
CSR = (
    Task("piqa", "acc_norm", "piqa_validation.jsonl", "validation", ("goal", "sol1", "sol2", "label"), "piqa"),
    Task("winogrande", "acc", "winogrande_xl_validation.jsonl", "validation", ("sentence", "option1", "option2", "answer"), "winogrande"),
    Task("hellaswag", "acc_norm", "hellaswag_validation.jsonl", "validation", ("activity_label", "ctx_a", "ctx_b", "endings", "label"), "hellaswag"),
    Task("arc_easy", "acc_norm", "arc_easy_test.jsonl", "test", _QUESTION, "arc"),
    Task("arc_challenge", "acc_norm", "arc_challenge_test.jsonl", "test", _QUESTION, "arc"),
    Task("commonsense_qa", "acc", "commonsense_qa_validation.jsonl", "validation", _QUESTION, "commonsense_qa"),
    Task("openbookqa", "acc_norm", "openbookqa_test.jsonl", "test", ("question_stem", "choices", "answerKey"), "openbookqa"),
)
MMLU = Task("mmlu", "acc", "mmlu_test.jsonl", "test", ("question", "subject", "choices", "answer"), "mmlu/default")
MMLU_CATEGORIES = ("mmlu_humanities", "mmlu_social_sciences", "mmlu_stem", "mmlu_other")
GROUPS = {"csr": CSR, "mmlu": (MMLU,)}
TASKS = {task.name: task for task in (*CSR, MMLU)}
NAMES = ("csr", *TASKS)  # what a user may ask for


def chosen_tasks(names: Sequence[str]) -> tuple[Task, ...]:
    """The tasks that names stand for, each once, in the order of the table.

    Raises:
        ValueError: an unknown name, or none.
    """
    if not names:
        raise ValueError(f"no zero-shot task is named; allowed are {', '.join(NAMES)}")
    for name in names:
        if name not in NAMES:
            raise ValueError(f"zero-shot task {name!r}; allowed are {', '.join(NAMES)}")
    wanted = {task for name in names for task in GROUPS.get(name) or (TASKS[name],)}
    return tuple(task for task in TASKS.values() if task in wanted)


def rows_file(data: Path, task: Task) -> Path:
    """Path of a task's rows in a data folder.

    Raises:
        ValueError: it is missing.
    """
    file = data / task.file
    if not file.is_file():
        raise ValueError(f"{file}: no such file; --data is a folder that holds {file.name} for {task.name}; without --data the hub is read")
    return file


def read_rows(data: Path, task: Task) -> list[dict[str, Any]]:
    """The rows of a task in a data folder.

    Raises:
        ValueError: the file is missing, not UTF-8 or empty, or a line is not an object with the task's fields.
    """
    file = rows_file(data, task)
    rows = []
    for place, row in read_entries(file):
        missing = [field for field in task.fields if not isinstance(row, dict) or field not in row]
        if missing:
            raise ValueError(f"{place}: no field {missing[0]!r}; {task.name} needs {', '.join(task.fields)}")
        rows.append(row)
    if not rows:
        raise ValueError(f"{file}: holds no questions")
    return rows


class HarnessTasks:
    """The harness's objects for some tasks, each task and each subject of MMLU one.

    Attributes:
        loaded: what the harness's `evaluate` takes.
        categories: subjects of each category of MMLU, by the harness's names.

    Raises:
        ValueError: a file or the hub does not give what the harness needs; names it and says what to do.
    """

    def __init__(self, chosen: Sequence[Task], data: Path | None) -> None:
        """Load the rows and the configurations."""
        import lm_eval.tasks  # noqa: PLC0415  (an optional dependency, checked by the caller)

        root = Path(lm_eval.tasks.__file__).parent
        # The folders that are needed: an index of all of the harness's thousands of tasks takes ten seconds.
        self._manager = lm_eval.tasks.TaskManager(include_defaults=False, include_path=[root / folder for folder in {t.folder for t in chosen}])
        subjects = {name: sorted(self._manager.task_index[f"{name}_tasks"].tags) for name in MMLU_CATEGORIES} if MMLU in chosen else {}
        self.categories: dict[str, list[str]] = subjects
        self.loaded: dict[str, Any] = {"tasks": {}, "groups": {}, "group_map": {}}
        for task in chosen:
            leaves = [name for names in subjects.values() for name in names] if task is MMLU else [task.name]
            rows = None if data is None else read_rows(data, task)
            for leaf in leaves:
                self._load(leaf, task, rows, data)

    def _load(self, leaf: str, task: Task, rows: list[dict[str, Any]] | None, data: Path | None) -> None:
        """Build one of the harness's tasks, by its stock configuration; with rows, these are its data set."""
        place = f"the hub did not give {leaf}" if data is None else f"{data / task.file}: the harness cannot ask {leaf} by it"
        advice = f"; give --data DIR, a folder that holds {task.file}" if data is None else ""
        if rows is not None and task is MMLU:
            rows = [row for row in rows if f"mmlu_{row['subject']}" == leaf]
            if not rows:
                raise ValueError(f"{data and data / task.file}: holds no questions of the subject {leaf.removeprefix('mmlu_')!r}")
        try:
            item = {"task": leaf, **({} if rows is None else _from_rows(rows, task.split))}
            built = self._manager.load([{"group": "zero-shot", "task": [item]}])["tasks"]
        except Exception as error:
            raise ValueError(f"{place}: {type(error).__name__}: {(str(error).splitlines() or [''])[0]}{advice}") from error
        for name, harness_task in built.items():
            harness_task.set_config(key="num_fewshot", value=0)
            for split in ("validation_docs", "test_docs"):  # which work out a task's rows anew whenever they are asked, five times a model
                setattr(harness_task, split, cache(getattr(harness_task, split)))
            self.loaded["tasks"][name] = harness_task


def _from_rows(rows: list[dict[str, Any]], split: str) -> dict[str, Any]:
    """What to change in a stock configuration so that its questions are these rows and it looks for no others."""
    import datasets  # noqa: PLC0415  (an optional dependency, checked by the caller)

    table = datasets.Dataset.from_list(rows)
    splits = {f"{name}_split": name if name == split else None for name in ("validation", "test")}
    none_else = {"training_split": None, "fewshot_split": None, "fewshot_config": None}
    return {"custom_dataset": lambda **_: {split: table}, **splits, **none_else}
