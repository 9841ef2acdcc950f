"""Several comparisons of one model as one picture of bits against perplexity, and its table.

Usage: python scripts/pareto.py OUT "TITLE" TABLE.csv ...

Each file is a `table.csv` of `rosaq compare`, or one with at least its columns bits, method, bits/weight and WikiText-2 PPL;
a method at the same bits that an earlier file has is left out of a later one. Writes OUT.md and OUT.svg. OUT.md says, too, which recipe
is the best of ours at several budgets, which the best of the others, and how many spreads over seeds they are apart.
"""

import csv
import sys
from pathlib import Path

from rosaq.comparison import pareto
from rosaq.comparison.table import BITS_COLUMN, PERPLEXITY_COLUMN, Figure, Row, Table, shown

BITS = {"FP16": 16, "INT4": 4, "INT3": 3, "INT2": 2, "INT2-4": 0, "INT3/4": 0}  # the last one in tables of before
PARTS = (" spread", " standard error", " seeds")
MOST_BITS = 6.0  # rows of more are left out of the picture
BUDGETS = (3.35, 3.4, 3.9, 4.05, 4.35, 4.5, 5.0)


def read_rows(file: Path) -> list[Row]:
    """The rows of a comparison's CSV file; those from the paper are left out."""
    rows = []
    with file.open(newline="", encoding="utf-8") as lines:
        for line in csv.DictReader(lines):
            figures = {}
            for column, text in line.items():
                if column in ("bits", "method", "published") or column.endswith(PARTS) or not text:
                    continue
                spread, seeds = line.get(f"{column} spread"), line.get(f"{column} seeds")
                figures[column] = Figure(float(text), float(spread) if spread else None, None, int(seeds) if seeds else 1)
            if not line.get("published"):
                rows.append(Row(BITS[line["bits"]], line["method"], figures))
    return rows


def best(points: list[pareto.Point], budget: float) -> pareto.Point | None:
    """The point of lowest perplexity of at most so many bits per weight, none where there is none."""
    return min((point for point in points if point.bits <= budget), key=lambda point: point.perplexity.value, default=None)


def budget_lines(found: list[pareto.Point]) -> list[str]:
    """A table of the best of ours and of the others at each budget; a spread is the larger one of the two."""
    lines = ["| at most | ours | bits/weight | perplexity | others | bits/weight | perplexity | apart |", "|" + " --- |" * 8]
    ours, others = ([point for point in found if point.row.method.startswith(pareto.OWN) == own] for own in (True, False))
    for budget in BUDGETS:
        pair = best(ours, budget), best(others, budget)
        cells = [f"{budget:g}"]
        for point in pair:
            figure = None if point is None else point.perplexity
            cells += ["", "", ""] if point is None else [point.row.method, f"{point.bits:.3f}", shown(PERPLEXITY_COLUMN, figure)]
        apart = ""
        if pair[0] is not None and pair[1] is not None:
            spread = max(point.perplexity.spread or 0.0 for point in pair if point is not None)
            gap = pair[1].perplexity.value - pair[0].perplexity.value
            apart = f"{gap:.2f}" + (f", {gap / spread:.0f} spreads" if spread else "")
        lines.append("| " + " | ".join([*cells, apart]) + " |")
    return lines


def main(output: str, title: str, *files: str) -> None:
    """Join the files and draw them."""
    rows: dict[tuple[int, str], Row] = {}
    for file in files:
        for row in read_rows(Path(file)):
            rows.setdefault((row.bits, row.method), row)
    columns = list({column: None for row in rows.values() for column in row.figures})
    table = Table(title, columns, list(rows.values()), [])
    Path(f"{output}.md").write_text(pareto.markdown(table) + "\n" + "\n".join(budget_lines(pareto.points(table))) + "\n", encoding="utf-8")
    few = [row for row in table.rows if row.bits == 16 or row.figures[BITS_COLUMN].value <= MOST_BITS]
    pareto.plot(Table(title, columns, few, [])).savefig(f"{output}.svg")


if __name__ == "__main__":
    if len(sys.argv) < 4:
        sys.exit(__doc__)
    main(*sys.argv[1:])
