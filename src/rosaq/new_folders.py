"""Folders that a run makes: whether it can, and that one that fails leaves none behind above its output."""

import os
from collections.abc import Iterable
from pathlib import Path


def missing_parents(path: Path) -> list[Path]:
    """Folders above a path that are not there, the deepest first."""
    return [parent for parent in path.parents if not parent.exists()]


def remove_empty(folders: Iterable[Path]) -> None:
    """Remove folders one after the other, up to the first that is not empty or not there."""
    for folder in folders:
        try:
            folder.rmdir()
        except OSError:
            return


def check_writable(folder: Path) -> None:
    """Refuse a folder that neither is there nor could be made, before work whose result is to go into it.

    Raises:
        ValueError: names what is in the way.
    """
    folder = folder.expanduser().absolute()
    place = next(parent for parent in (folder, *folder.parents) if parent.exists())
    if not place.is_dir() or not os.access(place, os.W_OK | os.X_OK):
        raise ValueError(f"{folder}: cannot be written: {place} is not a folder that may be written into")
