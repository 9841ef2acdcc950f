"""The tensors of a folder's safetensors files, each read into memory of its own when asked for.

Files are read by position instead of being memory-mapped: a mapped file counts as memory of the process, and one that
is cut short or cannot be read while a run is at work would end it by a signal instead of a message.
"""

import json
import os
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

READ_BYTES = 1 << 26  # at a time, so that an interruption does not wait for long
TYPES = {
    "BOOL": torch.bool, "U8": torch.uint8, "I8": torch.int8, "I16": torch.int16, "I32": torch.int32, "I64": torch.int64,
    "F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32, "F64": torch.float64,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
}  # fmt: skip


@dataclass(frozen=True)
class Place:
    """Where a tensor lies: file, first byte in it, and its form."""

    file: Path
    start: int
    shape: tuple[int, ...]
    dtype: torch.dtype


class SafetensorsFolder(Mapping[str, torch.Tensor]):
    """The tensors of a folder's safetensors files by name, read when asked for."""

    def __init__(self, folder: Path) -> None:
        """Check every file's header and index the names.

        Raises:
            ValueError: no safetensors file, a file that the index names is missing, one is truncated or corrupt, or two
                hold a tensor of the same name.
        """
        self.places: dict[str, Place] = {}
        index = folder / "model.safetensors.index.json"
        if index.is_file():
            weight_map = read_json(index).get("weight_map", {})
            if not isinstance(weight_map, dict):
                raise ValueError(f"{index}: weight_map is a {type(weight_map).__name__}, not an object")
            self.files = sorted({safe_member(folder, name) for name in weight_map.values()})
        elif (folder / "model.safetensors").is_file():
            self.files = [folder / "model.safetensors"]
        else:
            self.files = sorted(folder.glob("*.safetensors"))
        if not self.files:
            raise ValueError(f"{folder}: no .safetensors file; pickled weights (.bin, .pt) are not read")
        for file in self.files:
            for name, place in tensor_places(file).items():
                if name in self.places:
                    raise ValueError(f"{file}: tensor {name!r} is in {self.places[name].file.name} too")
                self.places[name] = place

    def __getitem__(self, name: str) -> torch.Tensor:
        """Read one tensor.

        Raises:
            ValueError: the file cannot be read, or ends before the tensor does.
        """
        return self.read(name, self.places[name].shape)

    def read(self, name: str, shape: tuple[int, ...]) -> torch.Tensor:
        """Read as much of one tensor, from its start, as a tensor of this shape holds."""
        place = self.places[name]
        tensor = torch.empty(shape, dtype=place.dtype)
        if tensor.numel():
            try:
                with place.file.open("rb", buffering=0) as file:
                    read_at(file.fileno(), tensor, place.start)
            except (OSError, EOFError) as error:
                raise ValueError(f"{place.file}: tensor {name!r} cannot be read: {error}") from error
        return tensor

    def __contains__(self, name: object) -> bool:
        """Whether there is such a tensor, without reading it."""
        return name in self.places

    def __iter__(self) -> Iterator[str]:
        """Names of all tensors."""
        return iter(self.places)

    def __len__(self) -> int:
        """Number of tensors."""
        return len(self.places)


def first_row(tensors: Mapping[str, torch.Tensor], name: str) -> tuple[tuple[int, ...], torch.Tensor]:
    """Shape of a tensor, and its first row (all of a vector), contiguous; of a folder's files no more than that is read."""
    if isinstance(tensors, SafetensorsFolder):
        shape = tensors.places[name].shape
        return shape, tensors.read(name, shape[1:] if len(shape) > 1 else shape)
    tensor = tensors[name]
    return tuple(tensor.shape), (tensor[0] if tensor.dim() > 1 else tensor).contiguous()


def raw_bytes(tensor: torch.Tensor) -> memoryview:
    """The memory of a contiguous tensor on the CPU, to be read from a file or written to one."""
    values: Any = tensor.reshape(-1).view(torch.uint8).numpy()
    return memoryview(values)


def read_at(descriptor: int, tensor: torch.Tensor, start: int) -> None:
    """Fill a contiguous tensor on the CPU with the bytes of a file from `start` on.

    Raises:
        OSError: the file cannot be read.
        EOFError: it ends too early.
    """
    view, done = raw_bytes(tensor), 0
    while done < len(view):
        count = os.preadv(descriptor, [view[done : done + READ_BYTES]], start + done)
        if not count:
            raise EOFError(f"the file ends {len(view) - done} bytes too early")
        done += count


def write_at(descriptor: int, tensor: torch.Tensor, start: int) -> None:
    """Write the bytes of a contiguous tensor on the CPU into a file from `start` on."""
    view, done = raw_bytes(tensor), 0
    while done < len(view):
        done += os.pwrite(descriptor, view[done : done + READ_BYTES], start + done)


def tensor_places(file: Path) -> dict[str, Place]:
    """Where every tensor of a safetensors file lies; the library checks the header, its offsets and the file's size.

    Raises:
        ValueError: the file is truncated or corrupt, or holds a type that is not known; names it.
    """
    open_safetensors(file)
    with file.open("rb") as stream:
        (size,) = struct.unpack("<Q", stream.read(8))
        header = json.loads(stream.read(size))
    header.pop("__metadata__", None)
    places = {}
    for name, entry in header.items():
        if entry["dtype"] not in TYPES:
            raise ValueError(f"{file}: tensor {name!r} is of type {entry['dtype']}, which is not known")
        places[name] = Place(file, 8 + size + entry["data_offsets"][0], tuple(entry["shape"]), TYPES[entry["dtype"]])
    return places


def open_safetensors(file: Path) -> Any:
    """Open one safetensors file, memory-mapped.

    Raises:
        ValueError: the file is truncated or corrupt; names it.
    """
    try:
        return safe_open(file, framework="pt")
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{file}: not a readable safetensors file (truncated or corrupt): {error}") from error


def safe_member(folder: Path, name: Any) -> Path:
    """The path of a file that an index names, which must lie in the folder itself."""
    if not isinstance(name, str) or Path(name).name != name or "\0" in name:
        raise ValueError(f"{folder}: the index names {name!r}, which is not a plain file name")
    if not (folder / name).is_file():
        raise ValueError(f"{folder / name}: file is missing, though the index names it")
    return folder / name


def read_value(file: Path) -> Any:
    """The value of a JSON file, whatever it is.

    Raises:
        ValueError: missing, or not JSON; names the file.
    """
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"{file}: cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file}: not valid JSON: {error}") from error


def read_json(file: Path) -> dict[str, Any]:
    """A JSON object from a file.

    Raises:
        ValueError: missing, not JSON, or not an object; names the file.
    """
    value = read_value(file)
    if not isinstance(value, dict):
        raise ValueError(f"{file}: holds a JSON {type(value).__name__}, not an object")
    return value
