"""The checkpoint folder: safetensors shards, config.json, hashes; made in the work folder and renamed when whole.

Nothing half-written is ever under the name that the user gave. `rosaq.json` holds the SHA-256 of every shard and what
the run was; times and memory are not in it, so that the same run gives the same bytes.
"""

import json
from pathlib import Path
from typing import Any

from rosaq.architecture import BLOCKS, LINEARS
from rosaq.plan import Plan
from rosaq.safetensors_folder import read_json, safe_member
from rosaq.shard_files import ShardFiles, sha256
from rosaq.workfolder import WorkFolder, disk_errors, flush, write_whole

FORMAT_VERSION = 1
MANIFEST = "rosaq.json"


def finish_checkpoint(
    work: WorkFolder, shards: ShardFiles, config: Any, manifest: dict[str, Any], texts: dict[str, str], companions: list[Any]
) -> None:
    """Write what stands beside the shards; the checkpoint is whole then, in the work folder.

    Args:
        work: the run's folder.
        shards: all filled.
        config: transformers config, with `quantization_config` set.
        manifest: goes to `rosaq.json`, beside the hashes.
        texts: other text files by name, such as the model card.
        companions: what saves itself by `save_pretrained(folder)`: tokenizer, generation config.

    Raises:
        ValueError: the disk is full or refuses.
    """
    with disk_errors(work.destination):
        write_beside(work.checkpoint, shards.finish(), config, manifest, texts, companions)


def write_beside(
    folder: Path, files: dict[str, dict[str, Any]], config: Any, manifest: dict[str, Any], texts: dict[str, str], companions: list[Any]
) -> None:
    """Write what stands beside the shards, and have the whole folder on disk.

    Args:
        folder: with the shards in it.
        files: hash and size of each shard, by name.
        config: as for `finish_checkpoint`, like the rest.
        manifest: see there.
        texts: see there.
        companions: see there.
    """
    for companion in [config, *companions]:
        companion.save_pretrained(folder)
    for name, text in texts.items():
        write_whole(folder / name, text.encode())
    entry = {"format_version": FORMAT_VERSION, "files": files, **manifest}
    write_whole(folder / MANIFEST, (json.dumps(entry, indent=2) + "\n").encode())
    for file in (*folder.iterdir(), folder):
        flush(file)


def check_published(work: WorkFolder, report: dict[str, Any]) -> dict[str, Any]:
    """Refuse a checkpoint that has the output's name already unless it is what this run made of it.

    Args:
        work: the run's folder, which only was to be removed.
        report: what is known of the report in `rosaq.json`.

    Returns:
        That report.

    Raises:
        ValueError: the output is something else.
    """
    path = work.destination / MANIFEST
    known: dict[str, Any] = read_json(path).get("report", {}) if path.is_file() else {}
    if any(known.get(key) != value for key, value in report.items()):
        raise ValueError(f"{work.destination}: output folder is not empty; name another or empty it")
    return known


def published_recipe(work: WorkFolder) -> dict[str, Any]:
    """The recipe of the checkpoint that has the output's name already, as it says; empty where there is none."""
    path = work.destination / MANIFEST
    recipe: dict[str, Any] = read_json(path).get("report", {}).get("recipe", {}) if path.is_file() else {}
    return recipe


def quantization_config(plan: Plan, recipe: dict[str, Any], calibration: dict[str, Any]) -> dict[str, Any]:
    """What config.json says of a quantized model.

    Args:
        plan: form of every layer.
        recipe: `Recipe.to_dict`.
        calibration: record of the text.
    """
    shared, own = plan.blocks[0], {}
    for index, block in enumerate(plan.blocks):
        own.update({f"{BLOCKS}.{index}.{LINEARS[role]}": layout.form() for role, layout in block.items() if layout != shared[role]})
    config = {
        "quant_method": "rosaq",
        "format_version": FORMAT_VERSION,
        "recipe": recipe,
        "calibration": calibration,
        "layouts": {LINEARS[role]: layout.form() for role, layout in shared.items()}
        | own
        | {module: layout.form() for module, layout in plan.tables.items()},
        "rotated_norms": list(plan.rotated_norms),
    }
    if plan.hadamard_inputs:
        config["hadamard_inputs"] = list(plan.hadamard_inputs)
    if plan.rotated_inputs:
        config["rotated_inputs"] = list(plan.rotated_inputs)
    return config


def is_checkpoint(folder: str | Path) -> bool:
    """Whether a local folder says that it is a rosaq checkpoint."""
    config = Path(folder) / "config.json"
    quantization = read_json(config).get("quantization_config") if config.is_file() else None
    return isinstance(quantization, dict) and quantization.get("quant_method") == "rosaq"


def verify(folder: str | Path) -> dict[str, Any]:
    """Check a checkpoint's shards against its recorded sizes and hashes.

    Returns:
        The manifest, `rosaq.json`.

    Raises:
        ValueError: a file is missing, truncated or changed, or the format version is not known; names the file.
    """
    folder = Path(folder)
    manifest = read_json(folder / MANIFEST)
    check_version(manifest.get("format_version"), folder / MANIFEST)
    files = manifest.get("files")
    if not isinstance(files, dict) or not files or not all(isinstance(entry, dict) and {"bytes", "sha256"} <= set(entry) for entry in files.values()):
        raise ValueError(f"{folder / MANIFEST}: names no files with their bytes and sha256, so nothing can be verified")
    for name, entry in files.items():
        path = safe_member(folder, name)
        size = path.stat().st_size
        if size != entry["bytes"]:
            raise ValueError(f"{path}: {size} bytes, but {entry['bytes']} were written; the file is truncated or not this checkpoint's")
        if sha256(path) != entry["sha256"]:
            raise ValueError(f"{path}: SHA-256 differs from the one in {MANIFEST}; the file is corrupt")
    return manifest


def check_version(version: Any, where: Path | str) -> None:
    """Refuse a format that this version of rosaq does not read."""
    if version != FORMAT_VERSION:
        raise ValueError(f"{where}: checkpoint format {version!r}; this rosaq reads format {FORMAT_VERSION}")
