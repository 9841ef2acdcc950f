"""Several comparisons of one model as one picture of bits against perplexity, and its table.

Usage: python scripts/pareto.py OUT "TITLE" TABLE.csv ...

Each file is a `table.csv` of `rosaq compare`, or one with at least its columns bits, method, bits/weight and WikiText-2 PPL;
a method at the same bits that an earlier file has is left out of a later one. Writes OUT.md and OUT.svg.
"""

import csv
import sys
from pathlib import Path

from rosaq.comparison import pareto
from rosaq.comparison.table import Figure, Row, Table

BITS = {"FP16": 16, "INT4": 4, "INT3": 3, "INT3/4": 0}
PARTS = (" spread", " standard error", " seeds")


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


def main(output: str, title: str, *files: str) -> None:
    """Join the files and draw them."""
    rows: dict[tuple[int, str], Row] = {}
    for file in files:
        for row in read_rows(Path(file)):
            rows.setdefault((row.bits, row.method), row)
    columns = list({column: None for row in rows.values() for column in row.figures})
    table = Table(title, columns, list(rows.values()), [])
    Path(f"{output}.md").write_text(pareto.markdown(table), encoding="utf-8")
    pareto.plot(table).savefig(f"{output}.svg")


if __name__ == "__main__":
    if len(sys.argv) < 4:
        sys.exit(__doc__)
    main(*sys.argv[1:])
