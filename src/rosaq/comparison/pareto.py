"""Bits per weight against what a model loses: the rows of a table, those that none is better than, and a picture by matplotlib."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from rosaq.comparison.table import BITS_COLUMN, DIVERGENCE_COLUMN, PERPLEXITY_COLUMN, Figure, Row, Table, shown
from rosaq.inspection.plots import require_matplotlib

AVERAGE_COLUMN = "average"
COLUMNS = (BITS_COLUMN, PERPLEXITY_COLUMN, DIVERGENCE_COLUMN, AVERAGE_COLUMN)
PANELS = {PERPLEXITY_COLUMN: "perplexity of WikiText-2", DIVERGENCE_COLUMN: "KL divergence there, nats", AVERAGE_COLUMN: "zero-shot average, %"}
OWN = "rosaq"  # what the names of our own recipes begin with
CEILING = 3.0  # perplexities above so many times the original's are left out of the plot


@dataclass(frozen=True)
class Point:
    """A row of the table as a point of the plot.

    Attributes:
        row: of the table.
        bits: per weight.
        perplexity: of WikiText-2.
        front: no other row has a lower perplexity at as few bits.
    """

    row: Row
    bits: float
    perplexity: Figure
    front: bool

    @property
    def method(self) -> str:
        """The row's, without the target that ends it: `rosaq-int4-3.9` is a point of `rosaq-int4, targets`."""
        method, _, target = self.row.method.rpartition("-")
        return f"{method}, targets" if self.row.bits == 0 and re.fullmatch(r"\d+(\.\d+)?", target) else self.row.method


def points(table: Table) -> list[Point]:
    """The quantized rows by bits per weight; rows without a perplexity or from the paper are left out."""
    rows = [row for row in table.rows if row.bits != 16 and not row.published and PERPLEXITY_COLUMN in row.figures]
    # bits as printed, since the seeds of a target differ by less
    rows.sort(key=lambda row: (round(row.figures[BITS_COLUMN].value, 3), row.figures[PERPLEXITY_COLUMN].value))
    found: list[Point] = []
    best = float("inf")
    for row in rows:
        perplexity = row.figures[PERPLEXITY_COLUMN]
        found.append(Point(row, row.figures[BITS_COLUMN].value, perplexity, perplexity.value < best))
        best = min(best, perplexity.value)
    return found


def drawn(table: Table) -> list[Point]:
    """The points that are not far above the original's perplexity, or above the lowest one where there is no original."""
    found, original = points(table), _original(table)
    least = min(point.perplexity.value for point in found) if original is None else original.figures[PERPLEXITY_COLUMN].value
    return [point for point in found if point.perplexity.value <= CEILING * least]


def _original(table: Table) -> Row | None:
    return next((row for row in table.rows if row.bits == 16 and PERPLEXITY_COLUMN in row.figures), None)


def markdown(table: Table) -> str:
    """The points as a GitHub table, fewest bits first, with how many calibration seeds each has; those of the front are bold."""
    columns = [column for column in COLUMNS if column in table.columns]
    lines = [f"# {table.title}: bits against loss", "", "| " + " | ".join(["method", *columns, "seeds"]) + " |", "|" + " --- |" * (len(columns) + 2)]
    original = [row for row in table.rows if row.bits == 16 and not row.published]
    for row, front in [*((point.row, point.front) for point in points(table)), *((row, False) for row in original)]:
        name = f"{row.method}, {row.section}" if row.bits not in (0, 16) else row.method
        seeds = str(row.figures[PERPLEXITY_COLUMN].seeds) if row.bits != 16 else ""
        cells = [f"**{name}**" if front else name, *(shown(column, row.figures.get(column)) for column in columns), seeds]
        lines.append("| " + " | ".join(cells) + " |")
    notes = ["Bold: no other row has a lower perplexity at as few bits.", *table.notes]
    return "\n".join(lines) + "\n\n" + "\n".join(f"- {note}" for note in notes) + "\n"


def plot(table: Table) -> Any:
    """What is lost against bits per weight, a matplotlib figure: a panel each of perplexity, divergence and zero-shot average, where a row has it.

    One line a method; the front is drawn through the perplexities. A method far above the original's perplexity is left out of
    all panels, unless all are so far.
    """
    original, found = _original(table), drawn(table) or points(table)
    columns = [column for column in PANELS if any(column in point.row.figures for point in found)]
    figure = require_matplotlib()(figsize=(9, 1.5 + 4.5 * len(columns)), layout="constrained")
    for axis, column in zip(figure.subplots(len(columns), squeeze=False, sharex=True)[:, 0], columns, strict=True):
        for number, method in enumerate(sorted({point.method for point in found})):
            own = [point for point in found if point.method == method and column in point.row.figures]
            marker = "*" if method.startswith(OWN) else "os^Dv<>pPX"[number // 10 % 10]
            _draw(axis, own, column, (method, f"C{number % 10}", marker))
        if original is not None and column in original.figures:
            value = original.figures[column].value
            axis.axhline(value, color="#888", linewidth=0.8, label=f"original, {value:.2f}")
        axis.set(xlabel="bits per weight", ylabel=PANELS[column], yscale="linear" if column == AVERAGE_COLUMN else "log")
    first = figure.axes[0]
    front = [point for point in found if point.front]
    first.plot([point.bits for point in front], [point.perplexity.value for point in front], color="#444", linewidth=0.8, linestyle="--", zorder=0)
    for ticks in (first.yaxis.set_major_formatter, first.yaxis.set_minor_formatter):
        ticks("{x:.0f}")
    first.set_title(table.title)
    figure.legend(*first.get_legend_handles_labels(), loc="outside lower center", fontsize="x-small", ncols=4)
    return figure


def _draw(axis: Any, own: Sequence[Point], column: str, style: tuple[str, str, str]) -> None:
    figures = [point.row.figures[column] for point in own]
    if not figures:
        return
    label, colour, marker = style
    axis.errorbar(
        [point.bits for point in own],
        [figure.value for figure in figures],
        yerr=[figure.spread or 0 for figure in figures],
        fmt=marker,
        color=colour,
        capsize=3,
        linewidth=0.8,
        linestyle="-" if len(own) > 2 else "none",
        markersize=9 if marker == "*" else 6,
        label=label,
    )
