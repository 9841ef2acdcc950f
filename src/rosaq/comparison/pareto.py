"""Bits per weight against what a model loses: the rows of a table, those that none is better than, and a plot by matplotlib."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from rosaq.comparison.table import BITS_COLUMN, DIVERGENCE_COLUMN, PERPLEXITY_COLUMN, Figure, Row, Table, shown
from rosaq.inspection.plots import require_matplotlib

COLUMNS = (BITS_COLUMN, PERPLEXITY_COLUMN, DIVERGENCE_COLUMN, "average")
OWN = "rosaq"  # what the names of our own recipes begin with
CEILING = 4.0  # perplexities above so many times the original's are left out of the plot


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
    rows.sort(key=lambda row: (row.figures[BITS_COLUMN].value, row.figures[PERPLEXITY_COLUMN].value))
    found: list[Point] = []
    best = float("inf")
    for row in rows:
        perplexity = row.figures[PERPLEXITY_COLUMN]
        found.append(Point(row, row.figures[BITS_COLUMN].value, perplexity, perplexity.value < best))
        best = min(best, perplexity.value)
    return found


def markdown(table: Table) -> str:
    """The points as a GitHub table, fewest bits first; those of the front are bold."""
    columns = [column for column in COLUMNS if column in table.columns]
    lines = [f"# {table.title}: bits against loss", "", "| " + " | ".join(["method", *columns]) + " |", "|" + " --- |" * (len(columns) + 1)]
    original = [row for row in table.rows if row.bits == 16 and not row.published]
    for row, front in [*((point.row, point.front) for point in points(table)), *((row, False) for row in original)]:
        name = f"{row.method}, {row.section}" if row.bits not in (0, 16) else row.method
        cells = [f"**{name}**" if front else name, *(shown(column, row.figures.get(column)) for column in columns)]
        lines.append("| " + " | ".join(cells) + " |")
    notes = ["Bold: no other row has a lower perplexity at as few bits.", *table.notes]
    return "\n".join(lines) + "\n\n" + "\n".join(f"- {note}" for note in notes) + "\n"


def plot(table: Table) -> Any:
    """Perplexity against bits per weight, a matplotlib figure: one line a method, the front drawn through."""
    found = points(table)
    original = next((row.figures[PERPLEXITY_COLUMN].value for row in table.rows if row.bits == 16 and PERPLEXITY_COLUMN in row.figures), None)
    ceiling = CEILING * (original or min(point.perplexity.value for point in found))
    figure = require_matplotlib()(figsize=(9, 5.5), layout="constrained")
    axis = figure.subplots()
    drawn = [point for point in found if point.perplexity.value <= ceiling]
    for number, method in enumerate(sorted({point.method for point in drawn})):
        own = [point for point in drawn if point.method == method]
        _draw(axis, own, method, f"C{number % 10}", "os^Dv<>pPX"[number // 10 % 10] if not method.startswith(OWN) else "*")
    front = [point for point in drawn if point.front]
    axis.plot([point.bits for point in front], [point.perplexity.value for point in front], color="#444", linewidth=0.8, linestyle="--", zorder=0)
    if original is not None:
        axis.axhline(original, color="#888", linewidth=0.8, label=f"original, {original:.2f}")
    axis.set(xlabel="bits per weight", ylabel="perplexity of WikiText-2", yscale="log", title=table.title)
    axis.legend(fontsize="x-small", ncols=2)
    return figure


def _draw(axis: Any, own: Sequence[Point], method: str, colour: str, marker: str) -> None:
    spread = [point.perplexity.spread or 0 for point in own]
    values = [point.perplexity.value for point in own]
    axis.errorbar(
        [point.bits for point in own],
        values,
        yerr=spread,
        fmt=marker,
        color=colour,
        capsize=3,
        linewidth=0.8,
        linestyle="-" if len(own) > 2 else "none",
        markersize=9 if marker == "*" else 6,
        label=method,
    )
