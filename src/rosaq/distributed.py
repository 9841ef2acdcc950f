"""Several processes on one model, as `torchrun` starts them: what each does, and what they tell each other.

Calibration windows and blocks are split over the ranks; sums are added up over them. Every rank must see the source
and the output's folder. gloo carries tensors on the CPU, NCCL those on CUDA devices.
"""

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
from torch import distributed

PATIENCE = timedelta(hours=2)  # a rank may wait while another samples its calibration text from a large model


@dataclass(frozen=True)
class Ranks:
    """This process among those that quantize together.

    Attributes:
        rank: its number; 0 writes what belongs to all.
        count: how many there are.
    """

    rank: int = 0
    count: int = 1

    @property
    def first(self) -> bool:
        """Whether this is the rank that writes what belongs to all."""
        return self.rank == 0

    def share(self, number: int) -> range:
        """Which of `number` things in a row are this rank's: a run of neighbours, as many as the others' or one more."""
        size, spare = divmod(number, self.count)
        start = self.rank * size + min(self.rank, spare)
        return range(start, start + size + (self.rank < spare))

    def add(self, tensor: torch.Tensor) -> torch.Tensor:
        """The sum of the ranks' tensors, in place, on every rank."""
        if self.count > 1:
            with self._others():
                distributed.all_reduce(tensor)
        return tensor

    def agree(self, value: Any) -> Any:
        """Rank 0's value, on every rank."""
        values = [value]
        if self.count > 1:
            with self._others():
                distributed.broadcast_object_list(values, 0, device=torch.device("cpu"))
        return values[0]

    def wait(self) -> None:
        """Go on when every rank has come here."""
        self.agree(None)
        self.add(torch.zeros(1))

    @contextlib.contextmanager
    def _others(self) -> Iterator[None]:
        try:
            yield
        except RuntimeError as error:
            told = str(error).splitlines()[0]
            raise ValueError(f"rank {self.rank} of {self.count}: another rank has ended or cannot be reached ({told})") from error


ALONE = Ranks()


def current_ranks() -> Ranks:
    """This process's rank in torch's default process group; alone where there is none."""
    if distributed.is_available() and distributed.is_initialized():
        return Ranks(distributed.get_rank(), distributed.get_world_size())
    return ALONE


@contextlib.contextmanager
def joined(device: str) -> Iterator[str]:
    """Join the ranks that `torchrun` has started, if it has; gives the device of this rank.

    Raises:
        ValueError: a device is named by number though there are several ranks, or there are fewer GPUs than ranks here.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield device
        return
    if device.startswith("cuda:"):
        raise ValueError(f"device {device!r} names one GPU, but torchrun started several ranks; give cuda, auto or cpu")
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda":
        local = int(os.environ.get("LOCAL_RANK", "0"))
        if local >= torch.cuda.device_count():
            raise ValueError(f"local rank {local}: PyTorch sees {torch.cuda.device_count()} CUDA GPUs here; start no more ranks than GPUs")
        device = f"cuda:{local}"
        torch.cuda.set_device(local)
    distributed.init_process_group("cpu:gloo,cuda:nccl" if device != "cpu" else "gloo", timeout=PATIENCE)
    yield device
    distributed.destroy_process_group()  # not after an error: it could wait for ranks that wait for this one to end
