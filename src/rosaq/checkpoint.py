"""The checkpoint folder: safetensors shards, config.json, hashes; written beside its place and renamed when whole.

Nothing half-written is ever left under the name that the user gave: shards go to a hidden sibling folder, are flushed
to disk, and the folder is renamed at the end. `rosaq.json` holds the SHA-256 of every shard and what was measured.
"""

import contextlib
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from rosaq.architecture import LINEARS
from rosaq.plan import Plan
from rosaq.source import read_json, safe_member

FORMAT_VERSION = 1
SHARD_BYTES = 5 * 10**9
MANIFEST = "rosaq.json"


class CheckpointWriter:
    """Writes one checkpoint folder; use as a context manager.

    Leaving the context without `finish`, for whatever reason, removes everything that was written.

    Raises:
        ValueError: the destination is a file or a folder that is not empty, cannot be written, or the disk is full.
    """

    def __init__(self, destination: str | Path) -> None:
        """Check the destination; nothing is written yet."""
        self.destination = Path(destination).expanduser().absolute()
        check_destination(self.destination)
        self._pending: dict[str, torch.Tensor] = {}
        self._pending_bytes = 0
        self._shards: list[list[str]] = []
        self._total_bytes = 0
        self._finished = False

    def __enter__(self) -> "CheckpointWriter":
        """Make the hidden folder."""
        with self._disk_errors():
            self.destination.parent.mkdir(parents=True, exist_ok=True)
            self.folder = Path(tempfile.mkdtemp(prefix=f".{self.destination.name}.partial-", dir=self.destination.parent))
            self.folder.chmod(0o777 & ~_umask())
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        """Remove what was written unless it was finished."""
        if not self._finished:
            shutil.rmtree(self.folder, ignore_errors=True)

    def add(self, tensors: dict[str, torch.Tensor]) -> None:
        """Take tensors by full name; a shard is written whenever enough have come."""
        for name, tensor in tensors.items():
            size = tensor.numel() * tensor.itemsize
            if self._pending and self._pending_bytes + size > SHARD_BYTES:
                self._write_shard()
            self._pending[name] = tensor.cpu().contiguous()
            self._pending_bytes += size

    def finish(self, config: Any, manifest: dict[str, Any], texts: dict[str, str], companions: list[Any]) -> None:
        """Write the rest and rename the folder to its place.

        Args:
            config: transformers config, with `quantization_config` set.
            manifest: goes to `rosaq.json`, beside the hashes.
            texts: other text files by name, such as the model card.
            companions: what saves itself by `save_pretrained(folder)`: tokenizer, generation config.
        """
        with self._disk_errors():
            if self._pending:
                self._write_shard()
            for companion in [config, *companions]:
                companion.save_pretrained(self.folder)
            for name, text in texts.items():
                (self.folder / name).write_text(text, encoding="utf-8")
            files = self._name_shards()
            entry = {"format_version": FORMAT_VERSION, "files": files, **manifest}
            (self.folder / MANIFEST).write_text(json.dumps(entry, indent=2) + "\n", encoding="utf-8")
            for file in self.folder.iterdir():
                _flush(file)
            check_destination(self.destination)
            if self.destination.exists():
                self.destination.rmdir()
            self.folder.rename(self.destination)
            _flush(self.destination.parent)
            self._finished = True

    def _write_shard(self) -> None:
        path = self.folder / f"shard-{len(self._shards)}.safetensors"
        with self._disk_errors():
            save_file(self._pending, path, metadata={"format": "pt"})
            path.chmod(0o666 & ~_umask())
        self._shards.append(list(self._pending))
        self._total_bytes += self._pending_bytes
        self._pending, self._pending_bytes = {}, 0

    def _name_shards(self) -> dict[str, dict[str, Any]]:
        """Give the shards the names that transformers looks for; hashes and sizes by name."""
        count = len(self._shards)
        names = ["model.safetensors"] if count == 1 else [f"model-{i + 1:05d}-of-{count:05d}.safetensors" for i in range(count)]
        files = {}
        for index, name in enumerate(names):
            path = (self.folder / f"shard-{index}.safetensors").rename(self.folder / name)
            files[name] = {"sha256": sha256(path), "bytes": path.stat().st_size}
        if count > 1:
            weight_map = {tensor: name for name, tensors in zip(names, self._shards, strict=True) for tensor in tensors}
            index_json = {"metadata": {"total_size": self._total_bytes}, "weight_map": weight_map}
            (self.folder / "model.safetensors.index.json").write_text(json.dumps(index_json, indent=2) + "\n", encoding="utf-8")
        return files

    @contextlib.contextmanager
    def _disk_errors(self) -> Iterator[None]:
        try:
            yield
        except (OSError, SafetensorError) as error:
            raise ValueError(f"{self.destination}: cannot be written: {error}") from error


def quantization_config(plan: Plan, recipe: dict[str, Any], calibration: dict[str, Any]) -> dict[str, Any]:
    """What config.json says of a quantized model.

    Args:
        plan: form of every layer.
        recipe: `Recipe.to_dict`.
        calibration: record of the text.
    """
    return {
        "quant_method": "rosaq",
        "format_version": FORMAT_VERSION,
        "recipe": recipe,
        "calibration": calibration,
        "layouts": {LINEARS[role]: layout.form() for role, layout in plan.linears.items()}
        | {module: layout.form() for module, layout in plan.tables.items()},
        "rotated_norms": list(plan.rotated_norms),
    }


def check_destination(destination: Path) -> None:
    """Refuse an output that exists and is not an empty folder."""
    if destination.is_dir():
        if any(destination.iterdir()):
            raise ValueError(f"{destination}: output folder is not empty; name another or empty it")
    elif destination.exists() or destination.is_symlink():
        raise ValueError(f"{destination}: output is not a folder")


def sha256(path: Path) -> str:
    """Hex SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def is_checkpoint(folder: str | Path) -> bool:
    """Whether a local folder says that it is a rosaq checkpoint."""
    config = Path(folder) / "config.json"
    return config.is_file() and (read_json(config).get("quantization_config") or {}).get("quant_method") == "rosaq"


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
    for name, entry in manifest["files"].items():
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


def _flush(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
