"""Text files that a user names: plain text, JSON, JSON Lines; all UTF-8."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any


def read_text(file: Path) -> str:
    """A text file's content.

    Raises:
        ValueError: it is missing, or not UTF-8; names the file.
    """
    try:
        return file.read_text(encoding="utf-8")
    except OSError as error:
        raise ValueError(f"{file}: cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"{file}: not UTF-8 text: {error}") from error


def read_entries(file: Path) -> Iterator[tuple[str, Any]]:
    """The values of a `.jsonl` file, one a line, blank lines left out, or of the list in a `.json` file; each with its place in words.

    Raises:
        ValueError: not UTF-8, not valid JSON, or no list; names the file, and the line of a `.jsonl` file.
    """
    text = read_text(file)
    if file.suffix == ".jsonl":
        for number, line in enumerate(text.split("\n"), 1):
            if line.strip():
                place = f"{file}, line {number}"
                yield place, _parsed(line, place)
        return
    values = _parsed(text, str(file))
    if not isinstance(values, list):
        raise ValueError(f"{file}: holds a JSON {type(values).__name__}, not a list")
    for number, value in enumerate(values, 1):
        yield f"{file}, entry {number}", value


def _parsed(text: str, place: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{place}: not valid JSON: {error}") from error
