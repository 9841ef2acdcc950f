"""What a folder holds of what rosaq measured, told by the files themselves and not by their names."""

import csv
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from rosaq.checkpoint import MANIFEST, is_checkpoint
from rosaq.comparison.experiment import Cell
from rosaq.comparison.published import Published
from rosaq.comparison.results import COMMON
from rosaq.comparison.table import PERPLEXITY_COLUMN
from rosaq.recipe import Recipe
from rosaq.safetensors_folder import read_json, read_value

# Kind of a JSON file -> keys that it has, and keys that the first of its rows has.
KINDS: dict[str, tuple[set[str], set[str]]] = {
    "inspection": ({"table8", "blocks", "errors"}, set()),
    "quantizing": ({"seconds_of_all_blocks", "report"}, set()),
    "run": ({"bits_per_weight", "seconds", "recipe", "calibration"}, set()),
    "evaluation": ({"model", "texts", "zeroshot"}, set()),
    "kernels": ({"rows"}, {"microseconds", "limit_us"}),
    "decoding": ({"rows", "settings"}, {"step_ms", "weights"}),
}
DAMAGED = (KeyError, TypeError, IndexError, AttributeError)
Made = TypeVar("Made")
KNOWN = (
    f"{MANIFEST} of a checkpoint, {COMMON} and cells of `rosaq compare`, inspection.json of `rosaq inspect`, or JSON files of `rosaq quantize`, "
    "`rosaq evaluate` or `rosaq benchmark`"
)

CHECKPOINT_CELL = "checkpoint."  # begins the name of a cell of `rosaq compare --checkpoints`


@dataclass(frozen=True)
class Found:
    """Something that was measured.

    Attributes:
        kind: "checkpoint", "comparison", or one of `KINDS`.
        path: the folder or file.
        data: of a checkpoint its manifest; of a comparison what its cells have in common; else the file's object.
        cells: of a comparison: the original first, then by bits, baselines before ROSAQ.
        published: the paper's figures that stand in a comparison's table, or None.
    """

    kind: str
    path: Path
    data: dict[str, Any]
    cells: tuple[tuple[Cell, dict[str, Any]], ...] = ()
    published: Published | None = None

    @property
    def name(self) -> str:
        """What to call it where there are several."""
        return self.path.stem if self.path.suffix == ".json" else self.path.name


@dataclass(frozen=True)
class Evidence:
    """Everything that a report is made of, in the order in which it was named."""

    found: tuple[Found, ...]

    def of(self, kind: str) -> list[Found]:
        """What there is of a kind."""
        return [one for one in self.found if one.kind == kind]


def made_of(evidence: Evidence, make: Callable[[Evidence], Made]) -> Made:
    """What a function makes of the evidence, which is known by some of its keys only.

    Raises:
        ValueError: behind the keys of a file is not what rosaq writes there; names the file.
    """
    try:
        return make(evidence)
    except DAMAGED:
        for one in evidence.found:
            try:
                make(Evidence((one,)))
            except DAMAGED as error:
                what = f"{type(error).__name__}: {' '.join(str(error).split())}"
                raise ValueError(f"{one.path}: looks like {one.kind!r}, but is not as rosaq writes that ({what})") from error
        raise


def read_evidence(places: list[Path]) -> Evidence:
    """Read folders, and the folders right inside them.

    Args:
        places: folders, or single JSON files.

    Raises:
        ValueError: a place does not exist or holds nothing that is known, or a file is damaged; names it.
    """
    found: dict[Path, Found] = {}
    for place in places:
        path = place.expanduser().resolve()
        if not path.exists():
            raise ValueError(f"{place}: no such folder or file")
        here = _file(path) if path.is_file() else _folder(path)
        if path.is_dir() and not (here and here[0].kind in ("comparison", "checkpoint")):
            here += [one for inner in sorted(path.iterdir()) if inner.is_dir() and not inner.name.startswith(".") for one in _folder(inner)]
        if not here:
            raise ValueError(f"{place}: nothing here that a report is made of; known are {KNOWN}")
        found.update({one.path: one for one in here if one.path not in found})
    return Evidence(tuple(found.values()))


def _folder(path: Path) -> list[Found]:
    """What lies in one folder; a comparison or a checkpoint is one thing."""
    if (path / COMMON).is_file():
        return [_comparison(path)]
    if (path / MANIFEST).is_file() and is_checkpoint(path):
        return [Found("checkpoint", path, read_json(path / MANIFEST))]
    return [one for file in sorted(path.glob("*.json")) for one in _file(file)]


def _file(path: Path) -> list[Found]:
    value = read_value(path)
    if not isinstance(value, dict):
        return []
    for kind, (keys, row_keys) in KINDS.items():
        rows = value.get("rows")
        first = rows[0] if isinstance(rows, list) and rows and isinstance(rows[0], dict) else {}
        if keys <= set(value) and row_keys <= set(first):
            return [Found(kind, path, value)]
    return []


def _comparison(path: Path) -> Found:
    cells = []
    for file in sorted((path / "cells").glob("*.json")):
        values = read_json(file)
        if not {"recipe", "bits", "seed", "figures", "runs"} <= set(values) or not isinstance(values["recipe"], dict | None):
            raise ValueError(f"{file}: not a cell of `rosaq compare`")
        recipe = None if values["recipe"] is None else Recipe.from_dict(values["recipe"], str(file))
        there = Path(file.stem.removeprefix(CHECKPOINT_CELL)) if file.stem.startswith(CHECKPOINT_CELL) else None
        cells.append((Cell(recipe, values["seed"], tuple(values["figures"]), there), values))
    if not cells:
        raise ValueError(f"{path}: a comparison without a finished cell; run `rosaq compare` on")
    return Found("comparison", path, read_json(path / COMMON), tuple(sorted(cells, key=_place)), _published(path / "table.csv"))


def _place(entry: tuple[Cell, dict[str, Any]]) -> tuple[Any, ...]:
    """Where a cell stands in the table: ROSAQ, which has salient channels in the basis of principal components, comes last."""
    cell, recipe = entry[0], entry[0].recipe
    if recipe is None:
        return (0,)
    changes = recipe.rotation != "none", recipe.scaling != "none", recipe.rounding != "nearest"
    return 1, -cell.row[0], is_rosaq(recipe), recipe.salient > 0, *changes, cell.row[1], cell.seed or 0


def is_rosaq(recipe: Recipe) -> bool:
    """Whether a recipe is ROSAQ or a variant: salient channels of a basis of principal components."""
    return recipe.salient > 0 and recipe.rotation in ("global", "per-layer")


def _published(file: Path) -> Published | None:
    """The paper's figures in a comparison's table, which only its CSV has."""
    if not file.is_file():
        return None
    with file.open(newline="", encoding="utf-8") as lines:
        rows = [row for row in csv.DictReader(lines) if row.get("published")]
    if not rows:
        return None
    try:
        figures = (
            (row["method"], 16 if row["bits"] == "FP16" else int(row["bits"].removeprefix("INT")), float(row[PERPLEXITY_COLUMN])) for row in rows
        )
        return Published("this model", tuple(figures))
    except (KeyError, ValueError) as error:
        raise ValueError(f"{file}: not a table of `rosaq compare`: {error}") from error
