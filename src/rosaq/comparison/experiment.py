"""What is to be compared: a model, the recipes as cells of a table, and what every cell has in common."""

import hashlib
import re
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from rosaq.calibration import Calibration
from rosaq.checkpoint import is_checkpoint
from rosaq.engines.transformers import RosaqConfig
from rosaq.evaluation.perplexity import WIKITEXT2_FILE, WINDOW
from rosaq.recipe import Recipe
from rosaq.safetensors_folder import first_row, raw_bytes
from rosaq.shard_files import sha256
from rosaq.source import Source
from rosaq.version import __version__

PERPLEXITY = "wikitext2"  # the task that every cell has; the others are for `Experiment.task_seeds` only
TASKS = (PERPLEXITY, "csr", "mmlu")


@dataclass(frozen=True)
class Cell:
    """One thing to measure: a recipe with its bits and calibration seed, a checkpoint that is there, or the original model.

    Attributes:
        recipe: what to quantize by, or what the checkpoint was; None for the original.
        seed: of the calibration text; None for the original.
        tasks: what it is evaluated on.
        checkpoint: folder of the checkpoint, where one is there.
    """

    recipe: Recipe | None
    seed: int | None
    tasks: tuple[str, ...]
    checkpoint: Path | None = None

    @property
    def name(self) -> str:
        """Name of its file, without the suffix."""
        if self.recipe is None:
            return "original"
        if self.checkpoint is not None:
            return f"checkpoint.{self.checkpoint.name}"
        return f"{self.recipe.name}.{'target' if self.recipe.target_bits else f'int{self.recipe.bits}'}.seed{self.seed}"

    @property
    def row(self) -> tuple[int, str]:
        """Bits (16: the original, 0: 2, 3 and 4 in one model) and method of its row in the table, which its other seeds share."""
        if self.recipe is None:
            return 16, "original"
        bits = 0 if self.recipe.target_bits or self.recipe.allocation else self.recipe.bits
        return bits, self.recipe.name if self.checkpoint is None else re.sub(r"-seed\d+$", "", self.checkpoint.name)


@dataclass(frozen=True)
class Experiment:
    """A comparison.

    Attributes:
        model: hub id, local folder or `.gguf` file.
        recipes: the rows; their own `bits` do not matter, and `bits` not to those with a target.
        bits: each recipe is run at each of these.
        seeds: of the calibration text; each recipe is run with each.
        tasks: out of TASKS.
        task_seeds: seeds whose cells are evaluated on all tasks; the others on WikiText-2 only. None: the first seed.
        calibration: which text, and how much; its seed is replaced.
        data: folder with the evaluation data, or None for the hub.
        window: tokens per window of perplexity.
        windows: use the first so many windows only.
        documents: use the first so many documents of each other task only.
        dtype: type that models are evaluated in.
        divergence: measure KL divergence from the original and top-1 agreement, too; the original then stays loaded.
        checkpoints: folders of checkpoints of this model that are rows too, by their names without "-seedN".

    Raises:
        ValueError: an empty or repeated choice, or one that is not allowed; names it.
    """

    model: str
    recipes: tuple[Recipe, ...]
    bits: tuple[int, ...] = (4, 3)
    seeds: tuple[int, ...] = (0,)
    tasks: tuple[str, ...] = (PERPLEXITY,)
    task_seeds: tuple[int, ...] | None = None
    calibration: Calibration = field(default_factory=Calibration)
    data: Path | None = None
    window: int = WINDOW
    windows: int | None = None
    documents: int | None = None
    dtype: str = "auto"
    divergence: bool = False
    checkpoints: tuple[Path, ...] = ()

    def __post_init__(self) -> None:
        """Refuse what would give no table, or two cells of one name."""
        for name in ("recipes", "bits", "seeds", "tasks"):
            values = [getattr(value, "name", value) for value in getattr(self, name)]
            repeated = next((value for value in values if values.count(value) > 1), None)
            if not values or repeated is not None:
                raise ValueError(f"{name}: {f'{repeated!r} is given twice' if values else 'none is given'}; give one or more, each once")
        for recipe in self.recipes:
            if not re.fullmatch(r"[\w.-]+", recipe.name) or recipe.name == "original":
                raise ValueError(f"recipe name {recipe.name!r} cannot name a file of results; use letters, digits, '.', '-' and '_'")
        for task in self.tasks:
            if task not in TASKS:
                raise ValueError(f"task {task!r}; allowed are {', '.join(TASKS)}")
        for seed in self.task_seeds or ():
            if seed not in self.seeds:
                raise ValueError(f"task seed {seed} is not one of the seeds {', '.join(map(str, self.seeds))}")

    def cells(self) -> list[Cell]:
        """All cells, those that take longest first: the original, then by seed, bits and recipe."""
        full = self.seeds[:1] if self.task_seeds is None else self.task_seeds
        cells = [Cell(None, None, self.tasks)]
        for seed in sorted(self.seeds, key=lambda seed: seed not in full):
            tasks = self.tasks if seed in full else tuple(task for task in self.tasks if task == PERPLEXITY)
            own = [recipe.replace(bits=bits) for bits in self.bits for recipe in self.recipes if not recipe.target_bits]
            cells += [Cell(recipe, seed, tasks) for recipe in (*own, *(recipe for recipe in self.recipes if recipe.target_bits)) if tasks]
        return cells + [_checkpoint_cell(folder, self.tasks) for folder in self.checkpoints]

    def calibrated(self, seed: int) -> Calibration:
        """The calibration of one seed."""
        return replace(self.calibration, seed=seed)

    def common(self, source: Source) -> dict[str, Any]:
        """What all cells of one folder of results must agree in, JSON-able."""
        text = Path(self.calibration.text).expanduser()
        return {
            "rosaq": __version__,
            "model": model_name(self.model),
            "model_sha256": fingerprint(source),
            "calibration text": text.name if text.is_file() else self.calibration.text,
            "calibration text sha256": file_sha256(text),
            "samples": self.calibration.samples,
            "seq_len": self.calibration.seq_len,
            "window": self.window,
            "windows": self.windows,
            "documents": self.documents,
            "dtype": self.dtype,
            "data": "hub" if self.data is None else file_sha256(self.data / WIKITEXT2_FILE),
            **({"divergence": True} if self.divergence else {}),
        }


def _checkpoint_cell(folder: Path, tasks: tuple[str, ...]) -> Cell:
    """The cell of a checkpoint that is there."""
    folder = folder.expanduser().absolute()
    if not is_checkpoint(folder):
        raise ValueError(f"{folder}: not the folder of a rosaq checkpoint")
    config = RosaqConfig.of(folder)
    return Cell(Recipe.from_dict(config.recipe), config.calibration.get("seed"), tasks, folder)


def model_name(model: str) -> str:
    """The last part of a model's hub id, folder or file: a folder may be moved."""
    return Path(model).expanduser().name


def fingerprint(source: Source) -> str:
    """SHA-256 over a model's sizes and the first row of each of its tensors: enough to tell models apart, quickly."""
    digest = hashlib.sha256(repr(source.architecture).encode())
    for name in sorted(source.tensors):
        shape, row = first_row(source.tensors, name)
        digest.update(f"{name} {shape} {row.dtype}".encode())
        digest.update(raw_bytes(row))
    return digest.hexdigest()


def file_sha256(path: Path) -> str | None:
    """SHA-256 of a file; None where there is none, such as for a calibration text that has a name."""
    return sha256(path) if path.is_file() else None


def sized(
    recipe: Recipe, group_size: int | None = None, salient: int | None = None, salient_per_head: int | None = None, salient_down: int | None = None
) -> Recipe:
    """A recipe with other sizes, where it has such channels at all: RTN stays without salient ones."""
    return recipe.replace(
        group_size=group_size,
        salient=salient if recipe.salient else None,
        salient_per_head=salient_per_head if recipe.salient_per_head else None,
        salient_down=salient_down if recipe.salient_down else None,
    )
