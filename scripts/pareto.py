"""Several comparisons of one model as one picture of bits against perplexity, and its table.

Usage: python scripts/pareto.py OUT "TITLE" TABLE.csv ...

Each file is a `table.csv` of `rosaq compare`, or one with at least its columns bits, method, bits/weight and WikiText-2 PPL;
a method at the same bits that an earlier file has is left out of a later one. Writes OUT.md and OUT.svg. OUT.md says, too, whether the
best of our recipes at several budgets, with training and without, is better than the best of the others by more than the spread over seeds;
what the picture leaves out, at more than three times the original's perplexity, does not count there.
"""

import csv
import sys
from pathlib import Path

from rosaq.comparison import pareto
from rosaq.comparison.table import BITS_COLUMN, PERPLEXITY_COLUMN, Figure, Row, Table, shown

BITS = {"FP16": 16, "INT4": 4, "INT3": 3, "INT2": 2, "INT2-4": 0}
PARTS = (" spread", " standard error", " seeds")
MOST_BITS = 6.0  # rows of more are left out of the picture
BUDGETS = (2.5, 2.8, 3.0, 3.2, 3.35, 3.4, 3.65, 3.9, 4.05, 4.2, 4.35, 4.5, 4.65, 5.0)
TRAINED = "distilled"  # in the names of our recipes that train


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


def verdict(ours: pareto.Point | None, others: pareto.Point | None) -> str:
    """Whether ours is better by more than the spread over seeds, the larger one of the two."""
    if ours is None or others is None:
        return "no, none of ours" if ours is None else "yes, none of the others"
    spread = max(point.perplexity.spread or 0.0 for point in (ours, others))
    gap = others.perplexity.value - ours.perplexity.value
    if abs(gap) <= spread:
        return f"no, {gap:+.2f} is within the spread"
    spreads = f", {abs(gap) / spread:.0f} spreads" if spread else ""
    single = ", one seed" if min(point.perplexity.seeds for point in (ours, others)) == 1 else ""
    return ("yes" if gap > 0 else "no") + f", {gap:+.2f}{spreads}{single}"


def budget_lines(ours: list[pareto.Point], others: list[pareto.Point]) -> list[str]:
    """A table of the best of ours and of the others at each budget that any of them meets."""
    lines = ["| at most | ours | bits/weight | perplexity | others | bits/weight | perplexity | ours is better |", "|" + " --- |" * 8]
    for budget in BUDGETS:
        pair = best(ours, budget), best(others, budget)
        cells = [f"{budget:g}"]
        for point in pair:
            figure = None if point is None else point.perplexity
            cells += ["", "", ""] if point is None else [point.row.method, f"{point.bits:.3f}", shown(PERPLEXITY_COLUMN, figure)]
        if pair != (None, None):
            lines.append("| " + " | ".join([*cells, verdict(*pair)]) + " |")
    return lines


def budget_text(table: Table) -> str:
    """The tables of all our recipes and of those that do not train; a method that is not drawn is none."""
    found = pareto.drawn(table)
    ours, others = ([point for point in found if point.row.method.startswith(pareto.OWN) == own] for own in (True, False))
    untrained = [point for point in ours if TRAINED not in point.row.method]
    parts = {"By budget": ours, "By budget, ours without training": untrained}
    return "\n".join(f"## {title}\n\n" + "\n".join(budget_lines(own, others)) + "\n" for title, own in parts.items())


def main(output: str, title: str, *files: str) -> None:
    """Join the files and draw them."""
    rows: dict[tuple[int, str], Row] = {}
    for file in files:
        for row in read_rows(Path(file)):
            rows.setdefault((row.bits, row.method), row)
    columns = list({column: None for row in rows.values() for column in row.figures})
    table = Table(title, columns, list(rows.values()), [])
    Path(f"{output}.md").write_text(pareto.markdown(table) + "\n" + budget_text(table), encoding="utf-8")
    few = [row for row in table.rows if row.bits == 16 or row.figures[BITS_COLUMN].value <= MOST_BITS]
    pareto.plot(Table(title, columns, few, [])).savefig(f"{output}.svg")


if __name__ == "__main__":
    if len(sys.argv) < 4:
        sys.exit(__doc__)
    main(*sys.argv[1:])
