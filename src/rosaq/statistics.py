"""What calibration leaves: the sites' inputs, which any number of recipes can share, and where they came from."""

import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch

from rosaq.architecture import SITES
from rosaq.calibration import Calibration, read_documents, sample_windows, token_windows, windows_hash
from rosaq.clock import Clock, Progress, no_progress
from rosaq.device import resolve_device
from rosaq.moments import BlockInputs, collect, collect_moments
from rosaq.skeleton import full_model
from rosaq.source import Source


@dataclass
class Statistics:
    """Inputs of every site of a model over its calibration windows.

    Attributes:
        record: the calibration's settings, sizes, and a SHA-256 of its tokens, JSON-able.
        inputs: per decoder block.
        windows: token ids (S, T).
        hold: keep whole second moments once a recipe has asked for them; see `moments_fit`.
        learned: rotations learned from the windows (`learned.Learned`), by what they depend on; filled by `quantize`.
    """

    record: dict[str, Any]
    inputs: list[BlockInputs]
    windows: torch.Tensor
    learned: dict[tuple[Any, ...], Any] = field(default_factory=dict)
    hold: bool = False
    _held: list[dict[str, torch.Tensor]] | None = field(default=None, repr=False)

    def second_moments(self, source: Source, device: str) -> Iterator[dict[str, torch.Tensor]]:
        """Whole second moments of each block's sites on the device, as `collect_moments` gives them: a pass over the text, unless they are held."""
        if self._held is not None:
            yield from ({site: moment.to(device) for site, moment in moments.items()} for moments in self._held)
            return
        held = []
        for moments in collect_moments(source, self.windows, device, compute_dtype(source, device)):
            if self.hold:
                held.append({site: moment.cpu() for site, moment in moments.items()})
            yield moments
        self._held = held if self.hold else None


def moments_fit(source: Source) -> bool:
    """Whether the whole second moments of all blocks take at most an eighth of the machine's memory."""
    a = source.architecture
    wanted = 4 * a.layers * sum(a.width(site) ** 2 for site in SITES)
    return 8 * wanted <= os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def measure(
    source: Source, calibration: Calibration | torch.Tensor, device: str = "auto", progress: Progress = no_progress, clock: Clock | None = None
) -> Statistics:
    """Run the model over the calibration text.

    Args:
        source: the model.
        calibration: which text; or token ids (S, T) themselves.
        device: where blocks run.
        progress: called as (stage, done, total).
        clock: takes the times of the stages "text" and "activations".

    Raises:
        ValueError: no text, too little of it, windows longer than the model's context, or activations that overflow.
    """
    clock, device = clock or Clock(), resolve_device(device)
    if isinstance(calibration, torch.Tensor):
        windows, settings = calibration, {"text": "token ids"}
        _check_length(windows.shape[1], source)
    else:
        settings = calibration.to_dict()
        _check_length(calibration.seq_len, source)
        with clock("text"):
            windows = read_windows(source, calibration, device, progress)
    if int(windows.max()) >= source.architecture.vocabulary or int(windows.min()) < 0:
        raise ValueError(f"calibration token {int(windows.max())} is not in the vocabulary of {source.architecture.vocabulary}")
    with clock("activations"):
        inputs = list(collect(source, windows, device, compute_dtype(source, device), progress))
    record = {**settings, "samples": windows.shape[0], "seq_len": windows.shape[1], "windows_sha256": windows_hash(windows)}
    return Statistics(record, inputs, windows)


def compute_dtype(source: Source, device: str) -> torch.dtype:
    """Type that blocks run in: bfloat16 for a bfloat16 model on a GPU, float32 otherwise.

    Float16 models do not run in float16: its range ends below the massive activations that some of them have.
    """
    return torch.bfloat16 if device.startswith("cuda") and source.dtype == torch.bfloat16 else torch.float32


def read_windows(source: Source, calibration: Calibration, device: str, progress: Progress = no_progress) -> torch.Tensor:
    """The calibration windows (S, T): from a text, or sampled from the model ("self", which loads it whole)."""
    if calibration.text == "self":
        return sample_windows(full_model(source, torch.bfloat16, device), calibration, progress)
    if source.tokenizer is None:
        raise ValueError(f"{source.name}: no tokenizer, so text cannot be read; calibrate with 'self'")
    return token_windows(read_documents(calibration.text), source.tokenizer, calibration)


def _check_length(seq_len: int, source: Source) -> None:
    if seq_len > source.architecture.context:
        raise ValueError(f"seq-len is {seq_len} tokens, but {source.name} has a context of {source.architecture.context}")
