"""Perplexity against the spread that `examples/planted_outliers.py` has planted into the norms' weights, one line a method and width.

Usage: python scripts/planted_spread.py OUT.svg "TITLE" SPREAD=TABLE.csv ...

Each file is the `table.csv` of `rosaq compare` on the model with that spread; 0 is the model as it is.
"""

import csv
import sys
from pathlib import Path

from rosaq.comparison.table import PERPLEXITY_COLUMN
from rosaq.inspection.plots import require_matplotlib

LINES = {"INT4": "-", "INT3": "--"}


def read_lines(tables: dict[float, Path]) -> dict[tuple[str, str], list[tuple[float, float]]]:
    """Points (spread, perplexity) by (method, bits), in the order of the spreads."""
    found: dict[tuple[str, str], list[tuple[float, float]]] = {}
    for spread, file in sorted(tables.items()):
        with file.open(newline="", encoding="utf-8") as lines:
            for row in csv.DictReader(lines):
                found.setdefault((row["method"], row["bits"]), []).append((spread, float(row[PERPLEXITY_COLUMN])))
    return found


def main(output: str, title: str, *named: str) -> None:
    """Draw the tables; the original is a level line."""
    tables = {float(spread): Path(file) for spread, _, file in (entry.partition("=") for entry in named)}
    figure = require_matplotlib()(figsize=(6, 4), layout="constrained")
    axis = figure.subplots()
    colours: dict[str, str] = {}
    for (method, bits), points in read_lines(tables).items():
        if bits == "FP16":
            axis.axhline(points[0][1], color="#888", linewidth=0.8, label=f"original, {points[0][1]:.2f}")
            continue
        colour = colours.setdefault(method, f"C{len(colours)}")
        axis.plot(*zip(*points, strict=True), marker="o", color=colour, linestyle=LINES.get(bits, ":"), label=f"{method}, {bits}")
    axis.set(
        xlabel="planted spread of the norms' weights (standard deviation of their logarithms)",
        ylabel="perplexity of WikiText-2",
        yscale="log",
        title=title,
    )
    axis.legend(fontsize="small")
    figure.savefig(output)


if __name__ == "__main__":
    if len(sys.argv) < 4:
        sys.exit(__doc__)
    main(*sys.argv[1:])
