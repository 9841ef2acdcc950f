"""The hidden states between two decoder blocks, of all calibration windows: on the device, in host memory or in a file.

Shape letters: S windows, T tokens, D hidden.
"""

import os
import tempfile
from pathlib import Path

import torch

from rosaq.safetensors_folder import read_at, write_at

PLACES = ("device", "host", "disk")


class Activations:
    """Hidden states (S, T, D) that are read and written some windows at a time; use as a context manager.

    Args:
        shape: (S, T, D).
        dtype: of the states.
        device: where they are computed.
        place: "device", "host" (page-locked for a GPU) or "disk".
        folder: for "disk": where the file is made, by default where temporary files go; it has no name, so nothing of it outlives the
            process.

    Raises:
        ValueError: the file cannot be written, such as on a full disk.
    """

    def __init__(self, shape: tuple[int, int, int], dtype: torch.dtype, device: str, place: str, folder: Path | None = None) -> None:
        """Take the memory; on disk, nothing yet."""
        assert place in PLACES
        self._shape, self._dtype, self._device, self._place, self._folder = shape, dtype, device, place, folder
        self._states = torch.empty(0)
        if place == "device":
            self._states = torch.empty(shape, dtype=dtype, device=device)
        elif place == "host":
            self._states = torch.empty(shape, dtype=dtype, pin_memory=device.startswith("cuda"))
        else:
            self._file = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115  (closed on exit)

    def __enter__(self) -> "Activations":
        """Nothing more to do."""
        return self

    def __exit__(self, *_: object) -> None:
        """Give the memory or the disk back."""
        if self._place == "disk":
            self._file.close()
        self._states = torch.empty(0)

    def read(self, rows: slice) -> torch.Tensor:
        """The states of some windows, on the device."""
        if self._place != "disk":
            return self._states[rows].to(self._device, non_blocking=True)
        part = torch.empty((rows.stop - rows.start, *self._shape[1:]), dtype=self._dtype)
        read_at(self._file.fileno(), part, self._first_byte(rows))
        return part.to(self._device)

    def write(self, rows: slice, states: torch.Tensor) -> None:
        """Replace the states of some windows."""
        if self._place != "disk":
            self._states[rows].copy_(states, non_blocking=True)
            return
        try:
            write_at(self._file.fileno(), states.cpu().contiguous(), self._first_byte(rows))
        except OSError as error:
            raise ValueError(
                f"{self._folder or tempfile.gettempdir()}: the activations cannot be written: {os.strerror(error.errno or 0)}"
            ) from error

    def _first_byte(self, rows: slice) -> int:
        return rows.start * self._shape[1] * self._shape[2] * self._dtype.itemsize
