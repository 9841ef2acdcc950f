"""The folder of a comparison: one JSON file a cell, written at once or not at all, and claims between processes.

`comparison.json` says what all cells agree in; `shared` holds what many cells need: statistics and whole moments until all cells
are there, and learned rotations. A claim is a lock on a file that the operating system gives back when its process ends, however it
ends, so that a dead process never blocks a cell.
"""

import fcntl
import hashlib
import json
import math
import shutil
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save

from rosaq.comparison.experiment import PERPLEXITY, Cell, Experiment
from rosaq.learned import Learned, learning_key
from rosaq.recipe import Recipe
from rosaq.safetensors_folder import read_json
from rosaq.source import Source
from rosaq.statistics import Statistics
from rosaq.workfolder import write_whole

COMMON = "comparison.json"
PARTS = ("cells", "claims", "checkpoints", "shared")

# What a cell's file holds as far as it is read again: types by key, those of "*" for every key, "?" behind one that may be missing.
NUMBER, NUMBER_OR_NONE = (int, float), (int, float, type(None))
SCORES = {"*": {"accuracy": NUMBER, "standard_error": NUMBER_OR_NONE}}
TASK = {"tasks": SCORES, "averages": SCORES}
TEXT = {"perplexity": NUMBER, "standard_error": NUMBER_OR_NONE, "windows": int, "window_tokens": int, "kl_divergence?": NUMBER}
ORIGINAL = {"recipe": type(None), "bits_per_weight": NUMBER, "figures": {f"{PERPLEXITY}?": TEXT, "csr?": TASK, "mmlu?": TASK}, "runs": list}
QUANTIZED = {**ORIGINAL, "recipe": dict, "calibration": {"text": str, "samples": int, "seq_len": int}}


class Results:
    """A folder of results; opening it makes it, or checks that it belongs to the same comparison.

    Raises:
        ValueError: it holds another comparison's results (says which setting differs), other files, or cannot be written.
    """

    def __init__(self, folder: Path, experiment: Experiment, source: Source, keep: bool = False) -> None:
        """Open or make the folder; with `keep`, checkpoints stay in it."""
        self.folder, self.experiment, self.keep = folder.expanduser().absolute(), experiment, keep
        common = experiment.common(source)
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            strange = sorted(entry.name for entry in self.folder.iterdir() if entry.name not in (COMMON, *PARTS))
            if strange and not (self.folder / COMMON).is_file():
                raise ValueError(f"{folder}: holds {strange[0]!r} and no {COMMON}, so it is not a folder of results; name another or an empty one")
            for name in PARTS:
                (self.folder / name).mkdir(exist_ok=True)
        except OSError as error:
            raise ValueError(f"{folder}: cannot be written: {error.strerror}") from error
        with self._lock(COMMON) as free:
            assert free
            if not (self.folder / COMMON).is_file():
                write_json(self.folder / COMMON, common)
        self._check(read_json(self.folder / COMMON), common)

    def _check(self, found: dict[str, Any], wanted: dict[str, Any]) -> None:
        for key in [*wanted, *found]:
            if found.get(key) != wanted.get(key):
                raise ValueError(
                    f"{self.folder}: holds another comparison: {key} is {found.get(key)!r} there and {wanted.get(key)!r} here; "
                    "name another folder, or repeat the options that it was made with"
                )

    def read(self, cell: Cell) -> dict[str, Any] | None:
        """What is known of a cell, or None.

        Raises:
            ValueError: its file is damaged (names the file and the value), or its recipe is another one of the same name; says which field differs.
        """
        file = self._file(cell)
        if not file.is_file():
            return None
        found = read_json(file)
        _check_form(file, "the cell", found, ORIGINAL if cell.recipe is None else QUANTIZED)
        if cell.recipe is not None and (recipe := Recipe.from_dict(found["recipe"], str(file))) != cell.recipe:
            before, wanted = recipe.to_dict(), cell.recipe.to_dict()
            key = next(key for key in wanted if before[key] != wanted[key])
            raise ValueError(f"{file}: recipe {cell.recipe.name!r} had {key} {before[key]!r}, now {wanted[key]!r}; name another folder")
        return found

    def missing(self, cell: Cell) -> tuple[str, ...]:
        """The tasks that a cell still lacks."""
        found = self.read(cell)
        return tuple(task for task in cell.tasks if found is None or task not in found["figures"])

    def write(self, cell: Cell, values: dict[str, Any]) -> None:
        """Keep a cell's result, durably."""
        write_json(self._file(cell), values)

    def fail(self, cell: Cell, why: str) -> None:
        """Note that a cell cannot be measured, so that no other process tries."""
        write_text(self._file(cell).with_suffix(".failed"), why)

    def failure(self, cell: Cell) -> str | None:
        """Why a cell could not be measured, or None."""
        file = self._file(cell).with_suffix(".failed")
        return file.read_text(encoding="utf-8") if file.is_file() else None

    def forget_failures(self) -> None:
        """Let failed cells be tried again."""
        for file in (self.folder / "cells").glob("*.failed"):
            file.unlink(missing_ok=True)

    def claim(self, cell: Cell) -> AbstractContextManager[bool]:
        """Hold a cell while the block runs; gives False where another process holds it."""
        return self._lock(cell.name, wait=False)

    @contextmanager
    def statistics(self, seed: int) -> Iterator[Statistics | None]:
        """Hold a seed's statistics while the block runs: another process waits; gives them, or None where nobody has written them yet."""
        with self._held(self._statistics(seed)) as tensors:
            yield None if tensors is None else Statistics.from_tensors(tensors)

    def write_statistics(self, seed: int, found: Statistics) -> None:
        """Keep a seed's statistics for the other processes."""
        write_whole(self._statistics(seed), save(found.tensors()))

    def moments(self, seed: int, sink_weight: int) -> AbstractContextManager[dict[str, torch.Tensor] | None]:
        """Hold a seed's whole second moments likewise; gives them, or None."""
        return self._held(self._moments(seed, sink_weight))

    def write_moments(self, seed: int, sink_weight: int, found: dict[str, torch.Tensor]) -> None:
        """Keep a seed's whole second moments for the other processes."""
        write_whole(self._moments(seed, sink_weight), save(found))

    def forget_statistics(self) -> None:
        """Remove all statistics and moments, which are large."""
        for file in (self.folder / "shared").glob("statistics.*"):
            file.unlink(missing_ok=True)

    @contextmanager
    def learning(self, cell: Cell) -> Iterator[bool]:
        """Hold what a cell has to learn while the block runs; gives False where another process learns it, True where nothing is to be learned."""
        file = self._learned(cell)
        if file is None or file.is_file():
            yield True
            return
        with self._lock(file.stem, wait=False) as free:
            yield free

    def read_learned(self, cell: Cell) -> Learned | None:
        """The rotations that a cell needs, as another cell of its seed has learned them, or None."""
        file = self._learned(cell)
        tensors = None if file is None else _tensors(file)
        return None if tensors is None else Learned.from_tensors(tensors)

    def write_learned(self, cell: Cell, found: Learned) -> None:
        """Keep a cell's learned rotations for those that share them, unless they are kept."""
        file = self._learned(cell)
        if file is not None and not file.is_file():
            write_whole(file, save({name: tensor.contiguous() for name, tensor in found.tensors().items()}))

    @contextmanager
    def checkpoint(self, cell: Cell) -> Iterator[Path]:
        """Where a claimed cell's checkpoint goes; removed after the block, as is what an earlier process left there."""
        place = self.folder / "checkpoints" / cell.name

        def remove(*folders: Path) -> None:
            for left in (*folders, *place.parent.glob(f".{cell.name}.*")):
                shutil.rmtree(left, ignore_errors=True)

        remove(place)
        try:
            yield place
        finally:
            remove(*() if self.keep else (place,))

    def _file(self, cell: Cell) -> Path:
        return self.folder / "cells" / f"{cell.name}.json"

    def _learned(self, cell: Cell) -> Path | None:
        """File of a cell's learned rotations, by seed of the text and all else that they depend on; None where it learns none."""
        if cell.recipe is None or cell.checkpoint is not None or cell.recipe.rotation != "learned":
            return None
        key = hashlib.sha256(repr(learning_key(cell.recipe)).encode()).hexdigest()[:16]
        return self._shared(f"rotations.seed{cell.seed}.{key}")

    def _statistics(self, seed: int) -> Path:
        return self._shared(f"statistics.seed{seed}")

    def _moments(self, seed: int, sink_weight: int) -> Path:
        return self._shared(f"statistics.seed{seed}.moments{sink_weight}")

    def _shared(self, name: str) -> Path:
        return self.folder / "shared" / f"{name}.safetensors"

    @contextmanager
    def _held(self, file: Path) -> Iterator[dict[str, torch.Tensor] | None]:
        """Hold what processes share while the block runs, and wait for whoever does; gives its tensors, or None where nobody has written them yet."""
        with self._lock(file.stem) as free:
            assert free
            yield _tensors(file)

    @contextmanager
    def _lock(self, name: str, wait: bool = True) -> Iterator[bool]:
        with (self.folder / "claims" / f"{name}.lock").open("w") as handle:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                yield False
                return
            yield True


def _check_form(file: Path, name: str, value: Any, form: Any) -> None:
    """Refuse a value in a cell's file that is not of its form: a type, several, or the forms of an object's keys."""
    if not isinstance(value, dict if isinstance(form, dict) else form):
        raise ValueError(f"{file}: {name} is {value!r}, which no cell has there; remove the file, and the cell is measured again")
    if not isinstance(form, dict):
        return
    for key, inner in form.items():
        for there in value if key == "*" else [key.removesuffix("?")]:
            if there in value:
                _check_form(file, there, value[there], inner)
            elif not key.endswith("?"):
                raise ValueError(f"{file}: {name} lacks {there!r}; remove the file, and the cell is measured again")


def _tensors(file: Path) -> dict[str, torch.Tensor] | None:
    """A file's tensors, or None where there is none."""
    return load_file(file) if file.is_file() else None


def write_json(file: Path, value: dict[str, Any]) -> None:
    """Write a JSON file at once: a reader sees the whole of it or nothing, and it survives a crash.

    Raises:
        ValueError: it cannot be written.
    """
    write_text(file, json.dumps(_finite(value), indent=2, allow_nan=False) + "\n")


def _finite(value: Any) -> Any:
    """The value with null for NaN, which JSON does not have: a standard error of one window."""
    if isinstance(value, dict):
        return {key: _finite(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def write_text(file: Path, text: str) -> None:
    """Write a text file at once, likewise."""
    try:
        write_whole(file, text.encode())
    except OSError as error:
        raise ValueError(f"{file}: cannot be written: {error.strerror}") from error
