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
    """Seconds of each stage, by name, in the order that they began; use as `with clock("stage"):`.

    A stage within a stage stops the outer one's time, so the seconds of all add up to the time that passed. A stage
    that runs again adds to its time. On a CUDA device a stage ends when its kernels have.
    """

    def __init__(self, device: str = "cpu") -> None:
        """Begin with no stage."""
        self.seconds: dict[str, float] = {}
        self._running: list[str] = []
        self._since = 0.0
        self._device = device

    @contextmanager
    def __call__(self, stage: str) -> Iterator[None]:
        """Time one stage."""
        self._turn()
        self._running.append(stage)
        self.seconds.setdefault(stage, 0.0)
        try:
            yield
        finally:
            self._turn()
            self._running.pop()

    def _turn(self) -> None:
        """Give the time since the last turn to the stage that was running."""
        if self._device.startswith("cuda"):
            torch.cuda.synchronize()
        now = time.perf_counter()
        if self._running:
            self.seconds[self._running[-1]] += now - self._since
        self._since = now


def peak_memory(device: str) -> tuple[int, int]:
    """Peak memory in bytes: of this process on the host, and of PyTorch on a CUDA device (0 on the CPU)."""
    host = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return host, torch.cuda.max_memory_allocated(device) if device.startswith("cuda") else 0
