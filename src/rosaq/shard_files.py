"""The safetensors shards of a checkpoint: laid out before any tensor is there, filled in any order, each tensor at its place.

What is written is what the safetensors library would write of the same tensors: in a shard the widest types come
first, tensors of a type by name, and the header is padded with spaces to a multiple of 8 bytes.
"""

import hashlib
import json
import os
import struct
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

from rosaq.safetensors_folder import TYPES, Place, raw_bytes, read_at, write_at

SHARD_BYTES = 5 * 10**9
INDEX = "model.safetensors.index.json"
WIDEST_FIRST = (torch.int64, torch.float64, torch.float32, torch.int32, torch.bfloat16, torch.float16, torch.int8, torch.uint8)
Form = tuple[tuple[int, ...], torch.dtype]


class ShardFiles:
    """Shards in a folder.

    Args:
        folder: where they are.
        forms: shape and type of every tensor, in the order that shards are filled.
    """

    def __init__(self, folder: Path, forms: Mapping[str, Form]) -> None:
        """Lay the tensors out; nothing is written yet."""
        self.folder, self.places = folder, dict[str, Place]()
        shards: list[list[str]] = [[]]
        filled = 0
        for name, form in forms.items():
            if shards[-1] and filled + _bytes(form) > SHARD_BYTES:
                shards.append([])
                filled = 0
            shards[-1].append(name)
            filled += _bytes(form)
        count = len(shards)
        self.total_bytes = sum(map(_bytes, forms.values()))
        self._headers: dict[str, tuple[bytes, int]] = {}
        for number, names in enumerate(shards, 1):
            self._lay_out(shard_name(number, count), {name: forms[name] for name in names})

    def _lay_out(self, file: str, forms: dict[str, Form]) -> None:
        type_names = {dtype: name for name, dtype in TYPES.items()}
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        end = 0
        ordered = sorted(forms, key=lambda name: (WIDEST_FIRST.index(forms[name][1]), name.encode()))
        for name in ordered:
            shape, dtype = forms[name]
            start, end = end, end + _bytes(forms[name])
            header[name] = {"dtype": type_names[dtype], "shape": list(shape), "data_offsets": [start, end]}
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        text += b" " * (-len(text) % 8)
        for name in ordered:
            start = 8 + len(text) + header[name]["data_offsets"][0]
            self.places[name] = Place(self.folder / file, start, *forms[name])
        self._headers[file] = (struct.pack("<Q", len(text)) + text, 8 + len(text) + end)

    def create(self) -> None:
        """Make the files, or go on with those that are there, and take all of their disk space.

        Raises:
            OSError: there is not enough of it.
        """
        self.folder.mkdir(exist_ok=True)
        for name, (header, size) in self._headers.items():
            handle = os.open(self.folder / name, os.O_CREAT | os.O_RDWR, 0o666)
            try:
                os.posix_fallocate(handle, 0, size)
                os.pwrite(handle, header, 0)
                os.fsync(handle)
            finally:
                os.close(handle)

    def write(self, tensors: Mapping[str, torch.Tensor]) -> str:
        """Put tensors in their places, on disk; returns a SHA-256 of them as `digest` gives it.

        Raises:
            OSError: the files cannot be written.
        """
        digest = hashlib.sha256()
        handles: dict[Path, int] = {}
        try:
            for name in sorted(tensors):
                place, tensor = self.places[name], tensors[name].cpu().contiguous()
                assert (tuple(tensor.shape), tensor.dtype) == (place.shape, place.dtype), (name, tensor.shape, tensor.dtype, place)
                if place.file not in handles:
                    handles[place.file] = os.open(place.file, os.O_RDWR)
                write_at(handles[place.file], tensor, place.start)
                digest.update(raw_bytes(tensor))
            for handle in handles.values():
                os.fsync(handle)
        finally:
            for handle in handles.values():
                os.close(handle)
        return digest.hexdigest()

    def digest(self, names: Iterable[str]) -> str:
        """SHA-256 of what the files hold of these tensors, in the order of their names.

        Raises:
            OSError, EOFError: they cannot be read.
        """
        digest = hashlib.sha256()
        for name in sorted(names):
            place = self.places[name]
            tensor = torch.empty(place.shape, dtype=place.dtype)
            with place.file.open("rb", buffering=0) as file:
                read_at(file.fileno(), tensor, place.start)
            digest.update(raw_bytes(tensor))
        return digest.hexdigest()

    def finish(self) -> dict[str, dict[str, Any]]:
        """Write the index where there are several shards; hashes and sizes of the shards by name."""
        self.write_index()
        with ThreadPoolExecutor() as pool:
            hashes = list(pool.map(sha256, [self.folder / name for name in self._headers]))
        return {name: {"sha256": digest, "bytes": size} for (name, (_, size)), digest in zip(self._headers.items(), hashes, strict=True)}

    def write_index(self) -> None:
        """Write the index where there are several shards."""
        if len(self._headers) > 1:
            write_index(self.folder, {name: place.file.name for name, place in self.places.items()}, self.total_bytes)


def shard_name(number: int, count: int) -> str:
    """File name of a shard, counted from 1, as transformers looks for it."""
    return "model.safetensors" if count == 1 else f"model-{number:05d}-of-{count:05d}.safetensors"


def write_index(folder: Path, weight_map: dict[str, str], total_bytes: int) -> None:
    """Write which tensor is in which of several shards."""
    index = {"metadata": {"total_size": total_bytes}, "weight_map": weight_map}
    (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def sha256(path: Path) -> str:
    """Hex SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _bytes(form: Form) -> int:
    return torch.Size(form[0]).numel() * form[1].itemsize
