"""The paper's own figures, to stand beside ours and never as ours: only for a model that the paper has."""

import tomllib
from dataclasses import dataclass
from importlib import resources
from typing import Any

from rosaq.architecture import Architecture

SOURCE = "arXiv:2506.13472"


@dataclass(frozen=True)
class Published:
    """WikiText-2 perplexities of one model as published.

    Attributes:
        title: the model's name in the paper.
        rows: (method, bits, perplexity), in the paper's order; 16 bits is the original.
    """

    title: str
    rows: tuple[tuple[str, int, float], ...]


def published(model: str, architecture: Architecture) -> Published:
    """The paper's figures of one of its models.

    Args:
        model: its name, as `--published` gives it.
        architecture: of the model at hand, which must be of that model's sizes.

    Raises:
        ValueError: the paper has no such model, or the one at hand is another.
    """
    table = _table()
    if model not in table:
        raise ValueError(f"published figures of {model!r}: the paper has {', '.join(table)}")
    entry = table[model]
    for name, wanted in entry["sizes"].items():
        found = architecture.family.model_type if name == "family" else getattr(architecture, name)
        if found != wanted:
            raise ValueError(f"published figures are {entry['title']}'s: {name} {wanted}, but the model's is {found}")
    rows = [("FP16", 16, entry["fp16"])]
    for bits in (4, 3):
        rows += [(method, bits, value) for method, value in entry[f"int{bits}"].items()]
    return Published(entry["title"], tuple(rows))


def _table() -> dict[str, Any]:
    return tomllib.loads(resources.files("rosaq.comparison").joinpath("published.toml").read_text(encoding="utf-8"))
