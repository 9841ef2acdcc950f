"""Cells to one table in the layout of ROSAQ's Table 5 (arXiv:2506.13472): the original, then each method per bits."""

import csv
import html
import io
import statistics
from dataclasses import dataclass, field
from typing import Any

from rosaq.comparison.experiment import PERPLEXITY, Cell
from rosaq.comparison.measures import task_figures
from rosaq.comparison.published import SOURCE, Published

BITS_COLUMN, PERPLEXITY_COLUMN, DIVERGENCE_COLUMN = "bits/weight", "WikiText-2 PPL", "KL"
CONSOLE_COLUMNS = {BITS_COLUMN: "bits/\nweight", PERPLEXITY_COLUMN: "PPL", "average": "csr\naverage", "MMLU average": "MMLU\naverage"}


@dataclass(frozen=True)
class Figure:
    """One number of the table.

    Attributes:
        value: mean over seeds; perplexity, percent, or bits.
        spread: sample standard deviation over seeds, where there are several.
        error: standard error of the measurement, where one seed was measured.
        seeds: how many were.
    """

    value: float
    spread: float | None = None
    error: float | None = None
    seeds: int = 1


@dataclass(frozen=True)
class Row:
    """A method at some bits (0: 2, 3 and 4 in one model); `published` names where its figures come from if they are not ours."""

    bits: int
    method: str
    figures: dict[str, Figure] = field(default_factory=dict)
    published: str = ""

    @property
    def section(self) -> str:
        """The part of the table that the row is in."""
        return {16: "FP16", 0: "INT2-4"}.get(self.bits, f"INT{self.bits}")


@dataclass(frozen=True)
class Table:
    """Rows in order, and the columns of figures that any of them has.

    Attributes:
        title: one line.
        columns: names of the figures.
        rows: the original's first.
        notes: what the figures are, one sentence each.
    """

    title: str
    columns: list[str]
    rows: list[Row]
    notes: list[str]

    def head(self) -> list[str]:
        """Names of all columns."""
        return ["bits", "method", *self.columns]

    def lines(self) -> list[list[str]]:
        """The rows as text."""
        return [[row.section, row.method + (" (published)" if row.published else ""), *self._shown(row)] for row in self.rows]

    def console(self) -> tuple[list[str], list[list[str]]]:
        """Head and rows of what 80 characters hold: of the zero-shot tasks the averages, without their spread."""
        kept = [column for column in CONSOLE_COLUMNS if column in self.columns]
        rows = []
        for row, line in zip(self.rows, self.lines(), strict=True):
            texts = [shown(column, row.figures.get(column)) for column in kept]
            rows.append([*line[:2], *(text if column == PERPLEXITY_COLUMN else text.split(" ")[0] for column, text in zip(kept, texts, strict=True))])
        return ["bits", "method", *(CONSOLE_COLUMNS[column] for column in kept)], rows

    def _shown(self, row: Row) -> list[str]:
        return [shown(column, row.figures.get(column)) for column in self.columns]

    def markdown(self) -> str:
        """A GitHub table."""
        parts = ["| " + " | ".join(self.head()) + " |", "|" + " --- |" * len(self.head())]
        parts += ["| " + " | ".join(line) + " |" for line in self.lines()]
        return f"# {self.title}\n\n" + "\n".join(parts) + "\n\n" + "\n".join(f"- {note}" for note in self.notes) + "\n"

    def csv(self) -> str:
        """Numbers in full: value, spread and standard error of each figure in columns of their own."""
        out = io.StringIO()
        writer = csv.writer(out, lineterminator="\n")
        parts = ("", " spread", " standard error", " seeds")
        writer.writerow(["bits", "method", "published", *(column + part for column in self.columns for part in parts)])
        for row in self.rows:
            numbers: list[Any] = []
            for column in self.columns:
                figure = row.figures.get(column)
                numbers += ["", "", "", ""] if figure is None else [figure.value, figure.spread, figure.error, figure.seeds]
            writer.writerow([row.section, row.method, row.published, *numbers])
        return out.getvalue()

    def html(self) -> str:
        """One page that needs nothing else."""
        head = "".join(f"<th>{html.escape(name)}</th>" for name in self.head())
        body, section = [], ""
        for row, line in zip(self.rows, self.lines(), strict=True):
            classes = " ".join([*(["published"] if row.published else []), *(["first"] if row.section != section else [])])
            section = row.section
            body.append(f'<tr class="{classes}">' + "".join(f"<td>{html.escape(text)}</td>" for text in line) + "</tr>")
        notes = "".join(f"<li>{html.escape(note)}</li>" for note in self.notes)
        title, rows = html.escape(self.title), "\n".join(body)
        return (
            f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{title}</title><style>{STYLE}</style></head>\n'
            f"<body><h1>{title}</h1><table><thead><tr>{head}</tr></thead>\n<tbody>{rows}</tbody></table><ul>{notes}</ul></body></html>\n"
        )


STYLE = (
    "body{font:15px/1.5 system-ui,sans-serif;margin:2rem;color:#222}h1{font-size:1.2rem}table{border-collapse:collapse}"
    "th,td{padding:.3rem .7rem;text-align:right;white-space:nowrap}th{border-bottom:2px solid #444}"
    "th:nth-child(-n+2),td:nth-child(-n+2){text-align:left}tr.first td{border-top:1px solid #999}tr.published td{color:#777;font-style:italic}"
)


def shown(column: str, figure: Figure | None) -> str:
    """A figure as the table prints it."""
    if figure is None:
        return ""
    digits = {BITS_COLUMN: 3, DIVERGENCE_COLUMN: 4}.get(column, 2)
    return f"{figure.value:.{digits}f}" + (f" ± {figure.spread:.{digits}f}" if figure.spread is not None else "")


def make_table(title: str, measured: list[tuple[Cell, dict[str, Any]]], paper: Published | None = None) -> Table:
    """One row for each recipe at its bits, its seeds together.

    Args:
        title: one line.
        measured: cells with their results, in order.
        paper: published figures of this very model.
    """
    groups: dict[tuple[int, str], list[dict[str, Any]]] = {}
    for cell, values in measured:
        groups.setdefault(cell.row, []).append(values)
    rows = [Row(bits, method, _figures(cells)) for (bits, method), cells in groups.items()]
    if paper is not None:
        rows += [Row(bits, method, {PERPLEXITY_COLUMN: Figure(value)}, SOURCE) for method, bits, value in paper.rows]
    rows.sort(key=lambda row: (-row.bits, bool(row.published)))
    named = {column: None for row in rows for column in row.figures}
    return Table(title, list(named), rows, _notes(measured, paper))


def _figures(cells: list[dict[str, Any]]) -> dict[str, Figure]:
    by_column: dict[str, list[tuple[float, float | None]]] = {BITS_COLUMN: [(statistics.fmean(cell["bits_per_weight"] for cell in cells), None)]}
    for cell in cells:
        results = cell["figures"]
        if PERPLEXITY in results:
            by_column.setdefault(PERPLEXITY_COLUMN, []).append((results[PERPLEXITY]["perplexity"], results[PERPLEXITY]["standard_error"]))
            if "kl_divergence" in results.get(PERPLEXITY, {}):
                by_column.setdefault(DIVERGENCE_COLUMN, []).append((results[PERPLEXITY]["kl_divergence"], None))
        for column, value, error in task_figures(results):
            by_column.setdefault(column, []).append((value, error))
    return {column: _joined(found) for column, found in by_column.items()}


def _joined(found: list[tuple[float, float | None]]) -> Figure:
    values = [value for value, _ in found]
    if len(values) == 1:
        return Figure(values[0], None, found[0][1])
    return Figure(statistics.fmean(values), statistics.stdev(values), None, len(values))


def _notes(measured: list[tuple[Cell, dict[str, Any]]], paper: Published | None) -> list[str]:
    seeds = sorted({cell.seed for cell, _ in measured if cell.seed is not None})
    notes = ["bits/weight counts all stored bits of the decoder's linear layers: codes, scales, zero points, salient channels, orders, rotations."]
    perplexities = [values["figures"][PERPLEXITY] for _, values in measured if PERPLEXITY in values["figures"]]
    if perplexities:
        windows, tokens = perplexities[0]["windows"], perplexities[0]["window_tokens"]
        notes.append(f"Perplexity over {windows} windows of {tokens} tokens.")
    if len(seeds) > 1:
        text = ", ".join(map(str, seeds))
        notes.append(f"Calibration seeds {text}: mean ± sample standard deviation where a figure has several; other figures are one seed's.")
    if any("kl_divergence" in figures for figures in perplexities):
        notes.append("KL: divergence of the predictions on the same windows from the original's, in nats per token.")
    calibration = next((values["calibration"] for cell, values in measured if cell.recipe is not None), None)
    if calibration is not None:
        notes.append(f"Calibrated on {calibration['samples']} windows of {calibration['seq_len']} tokens of {calibration['text']}.")
    if any("csr" in values["figures"] for _, values in measured):
        notes.append("Zero-shot: acc for WinoGrande and CSQA, acc_norm for the others, percent; their average is the plain mean of the seven.")
    if any("mmlu" in values["figures"] for _, values in measured):
        notes.append("MMLU: acc over four letters, zero-shot, percent; averages over questions.")
    if paper is not None:
        notes.append(f"Rows marked published are {paper.title}'s figures in {SOURCE}, not measured here.")
    return notes
