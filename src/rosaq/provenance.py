"""What a model says of where it comes from: license, languages, its place on the hub.

Read from the metadata block of a folder's README.md or from a GGUF file's own fields; nothing is guessed.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import metadata_load

HUB = "https://huggingface.co/"
HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
GGUF_REPOSITORY = ("general.source.repo_url", "general.source.huggingface.repository")  # of the model that the file was made from


@dataclass(frozen=True)
class Provenance:
    """What a model card carries over from the original.

    Attributes:
        hub_id: of the original, None where it is not known.
        license: the hub's identifier, such as "apache-2.0", None where none is stated.
        license_name: of a license that the hub has no identifier for.
        license_link: to its text.
        languages: codes, such as "en".
    """

    hub_id: str | None = None
    license: str | None = None
    license_name: str | None = None
    license_link: str | None = None
    languages: tuple[str, ...] = ()


UNKNOWN = Provenance()


def of_folder(folder: Path, hub_id: str | None) -> Provenance:
    """What the model card in a model's folder states.

    Args:
        folder: of the model.
        hub_id: where it was downloaded from, None for a local folder.

    Raises:
        ValueError: the metadata block of README.md is damaged.
    """
    card = folder / "README.md"
    try:
        found = (metadata_load(card) if card.is_file() else None) or {}
    except (ValueError, yaml.YAMLError) as error:
        raise ValueError(f"{card}: its metadata block cannot be read: {' '.join(str(error).split())}; mend it or remove the file") from error
    return _stated(found, hub_id)


def of_gguf(fields: Mapping[str, Any]) -> Provenance:
    """What the fields of a GGUF file state, by their names."""
    found = {name: fields.get(f"general.{name.replace('_', '.')}") for name in ("license", "license_name", "license_link")}
    addresses = (str(fields.get(key, "")).removeprefix(HUB).rstrip("/") for key in GGUF_REPOSITORY)
    hub_id = next((address for address in addresses if HUB_ID.fullmatch(address)), None)
    return _stated({**found, "language": fields.get("general.languages")}, hub_id)


def _stated(found: dict[str, Any], hub_id: str | None) -> Provenance:
    languages = found.get("language")
    given = languages if isinstance(languages, list) else [languages]
    license_id, name, link = (
        value.strip() or None if isinstance(value := found.get(f"license{part}"), str) else None for part in ("", "_name", "_link")
    )
    return Provenance(hub_id, license_id, name, link, tuple(one for one in given if isinstance(one, str)))
