"""The tables of the report, as text in cells."""

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rosaq.comparison.table import Table
from rosaq.inspection.page import TABLE_HEAD, table8
from rosaq.report.environment import environment
from rosaq.report.reading import Evidence, Found, is_rosaq
from rosaq.report.summary import MEGABYTE, comparison_tables, quantized

NUMBER = re.compile(r"[+-]?[\d.]+( (±|of) [\d.]+)?")  # as cells have it


@dataclass(frozen=True)
class Line:
    """A row of a table: its cells, and CSS classes."""

    cells: list[str]
    classes: str = ""


@dataclass(frozen=True)
class Grid:
    """A table as the page shows it; the first column is a name.

    Attributes:
        head: names of the columns.
        rows: as many cells each.
        title: above it, where there are several.
        notes: below it.
    """

    head: list[str]
    rows: list[Line]
    title: str = ""
    notes: list[str] = field(default_factory=list)

    @property
    def classes(self) -> list[str]:
        """CSS class of each column: words stand on the left, numbers on the right."""
        columns = ([row.cells[column] for row in self.rows if row.cells[column]] for column in range(len(self.head)))
        return ["" if place and all(NUMBER.fullmatch(cell) for cell in cells) else "words" for place, cells in enumerate(columns)]


def _filled(head: list[str], rows: list[list[str]]) -> Grid:
    """A table without the columns that nothing is known for."""
    kept = [column for column in range(len(head)) if any(row[column] for row in rows)]
    return Grid([head[column] for column in kept], [Line([row[column] for column in kept]) for row in rows])


def checkpoints(evidence: Evidence) -> Grid:
    """What was quantized: sizes, and time and memory where the run's own report is there."""
    head = ["checkpoint", "recipe", "bits per weight", "MB", "MB in FP16", "times smaller", "seconds", "peak host GiB", "peak GPU GiB"]
    head += ["KL before distilling", "KL after"]
    rows = []
    runs = {_identity(run.data): run.data for run in evidence.of("run")}
    for model in quantized(evidence):
        report, run = model.report, runs.get(_identity(model.report), {})
        peaks = [f"{run[key] / 2**30:.2f}" if run.get(key) else "" for key in ("peak_host_bytes", "peak_device_bytes")]
        seconds = f"{sum(run['seconds'].values()):.1f}" if run.get("seconds") else ""
        sizes = [f"{report[key] / MEGABYTE:.1f}" for key in ("checkpoint_bytes", "original_bytes")]
        falls = [f"{model.distilled[key]['kl_divergence']:.4f}" if model.distilled else "" for key in ("before", "after")]
        rows.append(
            [model.name, report["recipe"]["name"], f"{report['bits_per_weight']:.3f}", *sizes, f"{model.smaller:.2f}", seconds, *peaks, *falls]
        )
    return _filled(head, rows)


def _identity(report: dict[str, Any]) -> str:
    return f"{report['recipe']} {report['calibration']} {report['checkpoint_bytes']}"


def timed(evidence: Evidence) -> Grid:
    """Every case of `rosaq benchmark quantize`: its whole time, extrapolated to all blocks of the model, and its peaks."""
    head = ["run", "model", "recipe", "blocks", "on", "seconds", "seconds, all blocks", "peak host GiB", "peak GPU GiB"]
    rows = []
    for one in evidence.of("quantizing"):
        data, report = one.data, one.data["report"]
        seconds = [f"{sum(times.values()):.1f}" for times in (report["seconds"], data["seconds_of_all_blocks"])]
        peaks = [f"{report[key] / 2**30:.2f}" if report[key] else "" for key in ("peak_host_bytes", "peak_device_bytes")]
        blocks = f"{data['blocks']} of {data['blocks_of_model']}"
        rows.append([one.name, data["shape"], report["recipe"]["name"], blocks, f"{data['ranks']} x {data['hardware']}", *seconds, *peaks])
    return _filled(head, rows)


def evaluations(evidence: Evidence) -> Grid:
    """Perplexities of `rosaq evaluate`, and the divergence from the original where it was measured."""
    head = ["model", "text", "windows", "perplexity", "original's", "KL divergence, nats", "same likeliest token, %"]
    rows = []
    for one in evidence.of("evaluation"):
        for text, figures in one.data["texts"].items():
            own, reference = figures.get("model", figures), figures.get("reference")
            beside = [_with_error(reference), f"{figures['kl_divergence']:.4f}", f"{100 * figures['top1_agreement']:.2f}"] if reference else [""] * 3
            windows = f"{own['windows']} of {own['window_tokens']}"
            rows.append([Path(one.data["model"]).name, Path(text).name, windows, _with_error(own), *beside])
    return _filled(head, rows)


def _with_error(figures: dict[str, Any]) -> str:
    error = figures["standard_error"]
    return f"{figures['perplexity']:.3f}" + ("" if error is None else f" ± {error:.3f}")


def zero_shot(evidence: Evidence) -> Grid:
    """Accuracies of `rosaq evaluate --tasks`: each task but MMLU's subjects, then the averages."""
    rows = []
    for one in evidence.of("evaluation"):
        found = one.data["zeroshot"] or {"tasks": {}, "averages": {}}
        scores = {name: score for name, score in found["tasks"].items() if not name.startswith("mmlu_")}
        for name, score in [*scores.items(), *((f"average of {name}", score) for name, score in found["averages"].items())]:
            accuracy = f"{100 * score['accuracy']:.2f} ± {100 * score['standard_error']:.2f}"
            rows.append([Path(one.data["model"]).name, name, accuracy, str(score["questions"])])
    return _filled(["model", "task", "accuracy, %", "questions"], rows)


def comparisons(evidence: Evidence) -> list[Grid]:
    """Every comparison in the layout of the paper's Table 5."""
    tables = comparison_tables(evidence)
    return [_comparison(one, table, len(tables) > 1) for one, table in tables]


def _comparison(one: Found, table: Table, named: bool) -> Grid:
    """The method first, so that a phone keeps its name in sight; bits begin the sections."""
    lines, section = [], ""
    ours = {cell.row[1] for cell, _ in one.cells if cell.recipe is not None and is_rosaq(cell.recipe)}
    for row, cells in zip(table.rows, table.lines(), strict=True):
        marks = {"published": bool(row.published), "first": row.section != section, "ours": not row.published and row.method in ours}
        section = row.section
        lines.append(Line([f"{row.section} {cells[1]}", *cells[2:]], " ".join(name for name, marked in marks.items() if marked)))
    return Grid(["method", *table.columns], lines, table.title if named else "", table.notes)


def largest_channels(evidence: Evidence) -> list[Grid]:
    """The channels of largest magnitude in each inspection (the paper's Table 8)."""
    found = evidence.of("inspection")
    return [Grid(TABLE_HEAD, [Line(row) for row in table8(one.data)], one.name if len(found) > 1 else "") for one in found]


def decoded(evidence: Evidence) -> Grid:
    """Every case of `rosaq benchmark decode`."""
    head = ["model", "engine", "weights", "batch", "tokens", "ms per step", "tokens/s", "speed to FP16", "to best peer"]
    rows: list[list[str]] = []
    for one in evidence.of("decoding"):
        for row in sorted(one.data["rows"], key=lambda row: (row["engine"], row["batch"], row["tokens"])):
            ratios = ["" if row[key] is None else f"{row[key]:.2f}" for key in ("to_fp16", "to_best_peer")]
            speeds = [f"{row['step_ms']:.2f}", f"{row['throughput']:.0f}"]
            rows.append([one.data["model"], row["engine"], row["weights"], str(row["batch"]), str(row["tokens"]), *speeds, *ratios])
    return _filled(head, rows)


def machines(evidence: Evidence) -> Grid:
    """What each measurement ran on."""
    return Grid(["measurement", "machine and versions"], [Line(list(row)) for row in environment(evidence)])
