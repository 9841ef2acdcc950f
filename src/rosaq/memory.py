"""How much memory a run takes on the host and may take on a GPU, and where the activations go: device, pinned host memory or disk."""

import contextlib
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch

from rosaq.architecture import LINEARS, SITES, Architecture

UNITS = {"": 1, "B": 1, **{p + "B": 1000 ** (i + 1) for i, p in enumerate("KMGT")}, **{p + "iB": 1024 ** (i + 1) for i, p in enumerate("KMGT")}}
DEVICE_SHARE = 4  # activations stay on a GPU where they take at most so small a part of its free memory
# What libraries take on first use, and what the allocator keeps; on the CPU 10 to 75 MiB by measurement.
LIBRARIES = {"cpu": 96 << 20, "cuda": 1 << 30}
CGROUP = Path("/sys/fs/cgroup")


def parse_size(text: str) -> int:
    """Bytes out of a size such as "2GiB", "500 MB" or "1073741824".

    Raises:
        ValueError: not a size.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", text)
    if match is None or match[2] not in UNITS or not float(match[1]):
        raise ValueError(f"size {text!r}; allowed is a number above 0 with a unit, such as 2GiB or 500MB")
    return int(float(match[1]) * UNITS[match[2]])


def size_text(size: int) -> str:
    """A size in words: "2.50 GiB"; a small one in MiB or bytes, since it may lack the unit that was meant."""
    unit = next((power for power in (30, 20) if size >= 2 ** (power - 6)), 0)
    return f"{size / 2**unit:.2f} {'GiB' if unit == 30 else 'MiB'}" if unit else f"{size} bytes"


def available_bytes() -> int:
    """Host memory that this process may still take: the machine's, or what is left to its control group."""
    free = psutil.virtual_memory().available
    try:
        limit, used = ((CGROUP / name).read_text().strip() for name in ("memory.max", "memory.current"))
    except OSError:
        return free
    return free if limit == "max" else min(free, int(limit) - int(used))


def resident_bytes() -> int:
    """Memory of this process now."""
    return psutil.Process().memory_info().rss


@dataclass(frozen=True)
class Work:
    """What the work itself takes at its peak beside the activations, in bytes, estimated from the sizes.

    Attributes:
        host: on the host.
        activations: hidden states of all windows of this rank.
    """

    host: int
    activations: int


def estimate(a: Architecture, device: str, itemsize: int, tokens: tuple[int, int], second_pass: bool, learning: tuple[int, int] = (0, 0)) -> Work:
    """What quantizing takes.

    Args:
        a: the model's sizes.
        device: where it is computed.
        itemsize: bytes of a number that the blocks run in.
        tokens: in all windows of this rank, and in one batch.
        second_pass: whole second moments of all sites are made, a block at a time.
        learning: tokens of a step and of a window, where rotations are learned: the whole model is in memory then.
    """
    weights = sum(torch.Size(a.shape(role)).numel() for role in LINEARS)
    table, record = a.vocabulary * a.hidden * 2, 3 * 8 * a.hidden**2  # the residual stream's sum, and copies of it while it is written
    if device.startswith("cuda"):  # a second pass reads ahead beside the rounding, and page-locked memory, rounded up, is kept to the end
        locked = (2 if second_pass else 1) * 2 * weights * 2 * 1.1
        host = int(locked + max(weights * (2 + 1) + record, table * 4))
    else:
        widths = [a.width(site) for site in SITES] if second_pass else [a.hidden, a.hidden]
        moments = sum(width**2 for width in widths) * 12 + (max(widths) ** 2 * 32 if second_pass else 0)
        batch = tokens[1] * (16 * a.hidden + 8 * a.intermediate) * itemsize
        blocks = weights * (2 * 2 + itemsize * 2)  # two as read, one as it runs and folded
        # A table of a GGUF file is dequantized in float32, with copies.
        host = max(blocks + batch + moments + record, weights * (2 * 2 + 4 * 4) + moments, table * 10)
        if learning[0]:
            model = (weights * a.layers + a.vocabulary * a.hidden) * 2 + a.vocabulary * a.hidden * 4
            step = learning[0] * (a.layers * a.hidden + 36 * a.hidden + 18 * a.intermediate) * 4 + learning[1] * a.vocabulary * 4 * 6
            host = max(host, model + step + weights * 4 * 14)  # factors by measurement: a block and its gradient
    return Work(host + LIBRARIES[torch.device(device).type], tokens[0] * a.hidden * itemsize)


@contextlib.contextmanager
def device_bound(device: str, limit: int | None) -> Iterator[None]:
    """Have PyTorch take no more of a GPU's memory than a bound, in bytes, while the block runs (the CUDA context comes on top).

    Raises:
        ValueError: a bound for the CPU, or more was needed than the bound or the GPU's memory.
    """
    if not device.startswith("cuda"):
        if limit is not None:
            raise ValueError(f"max-device-memory is {size_text(limit)}, but the device is {device}; it bounds a GPU's memory, max-memory the host's")
        yield
        return
    index = torch.device(device).index
    index = torch.cuda.current_device() if index is None else index
    if limit is not None:
        torch.cuda.set_per_process_memory_fraction(min(1.0, limit / torch.cuda.get_device_properties(index).total_memory), index)
    try:
        yield
    except torch.OutOfMemoryError as error:
        bound = "the GPU has no more free" if limit is None else f"max-device-memory is {size_text(limit)}"
        held = torch.cuda.memory_allocated(index) / 2**30
        raise ValueError(f"{device}: out of memory with {held:.2f} GiB held: {bound}") from error
    finally:
        if limit is not None:
            torch.cuda.set_per_process_memory_fraction(1.0, index)


def place_activations(work: Work, device: str, limit: int | None, device_limit: int | None = None) -> str:
    """Where the activations fit: "device", "host" or "disk".

    Args:
        work: what the run takes.
        device: where it is computed.
        limit: host memory that the whole process may take; None: what is available now.
        device_limit: memory of the GPU likewise.

    Raises:
        ValueError: the limit is too small even with the activations on disk; says what is needed.
    """
    free = torch.cuda.mem_get_info(device)[0] if device.startswith("cuda") else 0
    if work.activations <= min(free, free if device_limit is None else device_limit) // DEVICE_SHARE:
        needed, place = 0, "device"
    else:
        needed, place = work.activations, "host"
    room = available_bytes() if limit is None else limit - resident_bytes()
    if room < work.host and limit is not None:
        least = math.ceil((resident_bytes() + work.host) / 2**30 * 100) / 100
        raise ValueError(f"max-memory is {size_text(limit)}, but this model takes about {least:.2f} GiB even with its activations on disk")
    return place if work.host + needed <= room else "disk"
