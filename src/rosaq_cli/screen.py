"""What the command line shows: progress bars with the time left, tables, and one sentence when something is wrong."""

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Literal

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

errors = Console(stderr=True)  # progress and messages; standard output is for results
results = Console()
StageReport = Callable[[str, int, int], None]  # called as (stage, done, total)


class StageBars:
    """One bar a stage, made when the stage first reports; call as (stage, done, total)."""

    def __init__(self, progress: Progress) -> None:
        """Show the bars in a running rich display."""
        self._progress = progress
        self._tasks: dict[str, TaskID] = {}

    def __call__(self, stage: str, done: int, total: int) -> None:
        """Set a stage's bar."""
        if stage not in self._tasks:
            self._tasks[stage] = self._progress.add_task(stage, total=total)
        self._progress.update(self._tasks[stage], completed=done, total=total)


@contextmanager
def stage_bars(quiet: bool = False) -> Iterator[StageReport]:
    """Bars on standard error while the block runs; none where it is no terminal, or quiet."""
    if quiet or not errors.is_terminal:
        yield lambda stage, done, total: None
        return
    name, counts = TextColumn("{task.description:>12}"), MofNCompleteColumn()
    columns = (name, BarColumn(), counts, TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn())
    with Progress(*columns, console=errors) as progress:
        yield StageBars(progress)


def show_table(title: str, columns: list[str], rows: list[list[str]], justify: Literal["left", "right"] = "right") -> None:
    """A table on standard output; the first column to the left and whole, the others as `justify` says."""
    table = Table(title=title, title_justify="left")
    for index, column in enumerate(columns):
        table.add_column(column, justify="left" if index == 0 else justify, no_wrap=index == 0, overflow="fold")
    for row in rows:
        table.add_row(*row)
    results.print(table)


def silence_transformers() -> None:
    """No bars of transformers' own: loading takes seconds, and ours tell of what takes longer."""
    from transformers.utils import logging

    logging.disable_progress_bar()


def show_json(value: dict[str, Any]) -> None:
    """A JSON object on standard output, for scripts."""
    print(json.dumps(value, indent=2))  # noqa: T201
