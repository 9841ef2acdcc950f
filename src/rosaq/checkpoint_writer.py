"""Writes a folder of safetensors shards at once or not at all: exports and models of random weights, which no run resumes.

What quantizing writes is laid out beforehand and filled in any order (`shard_files.py`); here tensors come one after
the other, and nobody knows how many.
"""

import os
import shutil
import tempfile
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from safetensors.torch import save_file

from rosaq.checkpoint import write_beside
from rosaq.new_folders import missing_parents, remove_empty
from rosaq.shard_files import SHARD_BYTES, sha256, shard_name, write_index
from rosaq.workfolder import check_destination, disk_errors, flush


class CheckpointWriter:
    """One folder of shards; use as a context manager.

    Leaving the context without `finish`, for whatever reason, removes everything that was written.

    Raises:
        ValueError: the destination is a file or a folder that is not empty, cannot be written, or the disk is full.
    """

    def __init__(self, destination: str | Path) -> None:
        """Check the destination; nothing is written yet."""
        self.destination = Path(destination).expanduser().absolute()
        check_destination(self.destination)
        self._pending: dict[str, torch.Tensor] = {}
        self._shards: list[list[str]] = []
        self._pending_bytes = self._total_bytes = 0
        self._finished = False

    def __enter__(self) -> "CheckpointWriter":
        """Make a hidden folder beside the destination."""
        self._made = missing_parents(self.destination)
        with disk_errors(self.destination):
            self.destination.parent.mkdir(parents=True, exist_ok=True)
            self.folder = Path(tempfile.mkdtemp(prefix=f".{self.destination.name}.writing-", dir=self.destination.parent))
            self.folder.chmod(0o777 & ~_umask())
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        """Remove what was written unless it was finished."""
        if not self._finished:
            shutil.rmtree(self.folder, ignore_errors=True)
            remove_empty(self._made)

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
            config: transformers config, with `quantization_config` where the weights are quantized.
            manifest: goes to `rosaq.json`, beside the hashes.
            texts: other text files by name, such as the model card.
            companions: what saves itself by `save_pretrained(folder)`: tokenizer, generation config.
        """
        with disk_errors(self.destination):
            if self._pending:
                self._write_shard()
            write_beside(self.folder, self._name_shards(), config, manifest, texts, companions)
            check_destination(self.destination)
            if self.destination.exists():
                self.destination.rmdir()
            self.folder.rename(self.destination)
            flush(self.destination.parent)
            self._finished = True

    def _write_shard(self) -> None:
        path = self.folder / f"shard-{len(self._shards) + 1}.safetensors"
        with disk_errors(self.destination):
            save_file(self._pending, path, metadata={"format": "pt"})
            path.chmod(0o666 & ~_umask())
        self._shards.append(list(self._pending))
        self._total_bytes += self._pending_bytes
        self._pending, self._pending_bytes = {}, 0

    def _name_shards(self) -> dict[str, dict[str, Any]]:
        """Give the shards the names that transformers looks for; hashes and sizes by name."""
        count, files, weight_map = len(self._shards), {}, {}
        for number, tensors in enumerate(self._shards, 1):
            name = shard_name(number, count)
            path = (self.folder / f"shard-{number}.safetensors").rename(self.folder / name)
            files[name] = {"sha256": sha256(path), "bytes": path.stat().st_size}
            weight_map.update(dict.fromkeys(tensors, name))
        if count > 1:
            write_index(self.folder, weight_map, self._total_bytes)
        return files


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
