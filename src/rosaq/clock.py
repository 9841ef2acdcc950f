"""Time of stages, peak memory, and how progress is told."""

import resource
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

Progress = Callable[[str, int, int], None]  # called as (stage, done, total)


def no_progress(stage: str, done: int, total: int) -> None:
    """Tell nothing."""


class Clock:
    """Seconds of each stage, by name, in the order that they ran; use as `with clock("stage"):`."""

    def __init__(self) -> None:
        """Begin with no stage."""
        self.seconds: dict[str, float] = {}

    @contextmanager
    def __call__(self, stage: str) -> Iterator[None]:
        """Time one stage."""
        start = time.perf_counter()
        yield
        self.seconds[stage] = round(time.perf_counter() - start, 3)


def peak_memory(device: str) -> tuple[int, int]:
    """Peak memory in bytes: of this process on the host, and of PyTorch on a CUDA device (0 on the CPU)."""
    host = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return host, torch.cuda.max_memory_allocated(device) if device.startswith("cuda") else 0
