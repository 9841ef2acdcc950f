"""The whole inspection of a model, JSON-able: ROSAQ's Table 8 and the data of its Figure 2 (arXiv:2506.13472)."""

from collections import deque
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from rosaq.architecture import NORMS, SITE_NORM, SITES
from rosaq.calibration import Calibration
from rosaq.checkpoint import is_checkpoint
from rosaq.clock import Progress, no_progress
from rosaq.device import resolve_device
from rosaq.inspection.channels import log_spread, outliers, top_channels
from rosaq.inspection.errors import checkpoint_errors
from rosaq.inspection.observation import GLOBAL, HEADS, LOCAL, NORMALISED, OWN, Observation, View, observe
from rosaq.safetensors_folder import read_json
from rosaq.source import Source, open_source
from rosaq.statistics import measure

ROTATED = {"attn_in": GLOBAL, "mlp_in": GLOBAL, "attn_out": HEADS}  # what ROSAQ turns each site into
SPECTRUM = {"attn_in": LOCAL, "mlp_in": LOCAL, "attn_out": HEADS}  # where a site's energies are its eigenvalues
DIGITS = 6  # significant ones, of what is plotted


@dataclass(frozen=True)
class Settings:
    """What to look at.

    Attributes:
        salient: channels of attn_in, mlp_in and mlp_out counted as leading.
        salient_per_head: likewise of each head of attn_out.
        top: rows of each part of Table 8.
    """

    salient: int = 128
    salient_per_head: int = 32
    top: int = 5


def inspect(
    model: str | Source,
    calibration: Calibration | None = None,
    settings: Settings = Settings(),  # noqa: B008  (frozen)
    checkpoint: Path | None = None,
    device: str = "auto",
    progress: Progress = no_progress,
) -> dict[str, Any]:
    """Look at a model's activations before and after rotation, and at what a checkpoint of it loses.

    Args:
        model: hub id, local folder, `.gguf` file, or an opened source.
        calibration: which text; by default the checkpoint's own, or without one 32 windows of 512 tokens of the Pile.
        settings: what to look at.
        checkpoint: folder of a rosaq checkpoint of this model.
        device: "auto", "cpu", "cuda" or "cuda:N".
        progress: called as (stage, done, total).

    Returns:
        JSON-able: "model", "calibration", "settings", "table8" (basis -> rows), "blocks" (per block and site: outlier
        figures and magnitudes per basis, the eigenvalues, and the spread of the norm's weights), "errors" (per layer, with a checkpoint).

    Raises:
        ValueError: sizes that the model does not have, a checkpoint of another model or calibration, or a bad text.
    """
    device = resolve_device(device)
    source = open_source(model) if isinstance(model, str) else model
    _check(settings, source)
    if calibration is None:
        calibration = Calibration(samples=32, seq_len=512) if checkpoint is None else recorded_calibration(checkpoint)
    statistics = measure(source, calibration, device, progress)
    residual: list[dict[str, View]] = []
    blocks: list[dict[str, Any]] = []

    def seen() -> Iterator[dict[str, Observation]]:
        """Every block as it comes: what is shown of it is kept, its moments are passed on."""
        for block in observe(source, statistics, device, progress):
            residual.extend(block[site].views for site in SITE_NORM)
            blocks.append({site: _site(site, block[site], settings, source, len(blocks)) for site in SITES})
            yield block

    if checkpoint is None:
        errors = []
        deque(seen(), 0)
    else:
        errors = checkpoint_errors(source, checkpoint, statistics, seen(), device, progress)
    return {
        "model": source.name,
        "calibration": statistics.record,
        "settings": asdict(settings),
        "table8": {
            basis: [asdict(channel) for channel in top_channels([views[basis] for views in residual], settings.top)]
            for basis in (OWN, NORMALISED, GLOBAL)
        },
        "blocks": blocks,
        "checkpoint": None if checkpoint is None else str(checkpoint),
        "errors": [asdict(error) for error in errors],
    }


def recorded_calibration(checkpoint: Path) -> Calibration:
    """The calibration that a checkpoint says it was made with.

    Raises:
        ValueError: it is no rosaq checkpoint, or it was calibrated on token ids that no text is named for.
    """
    record = read_json(checkpoint / "config.json")["quantization_config"].get("calibration") if is_checkpoint(checkpoint) else None
    if not isinstance(record, dict) or not {"text", "samples", "seq_len", "seed"} <= set(record):
        raise ValueError(f"{checkpoint}: not a rosaq checkpoint that names its calibration text; give --calibration")
    return Calibration(record["text"], record["samples"], record["seq_len"], record["seed"])


def _check(settings: Settings, source: Source) -> None:
    a = source.architecture
    for name, value, most in (("salient", settings.salient, a.hidden), ("salient_per_head", settings.salient_per_head, a.head_size)):
        if not 0 < value < most:
            raise ValueError(f"{name} is {value}, but there are {most} channels; allowed are 1 to {most - 1}")
    if not 0 < settings.top <= a.hidden:
        raise ValueError(f"top is {settings.top}; allowed are 1 to {a.hidden}")


def _site(site: str, kept: Observation, settings: Settings, source: Source, index: int) -> dict[str, Any]:
    heads = source.architecture.heads if site == "attn_out" else 1
    top = settings.salient_per_head if site == "attn_out" else settings.salient
    found: dict[str, Any] = {
        "figures": {basis: outliers(view, top, heads).to_dict() for basis, view in kept.views.items()},
        "magnitude": {basis: rounded(kept.views[basis].magnitude) for basis in (OWN, ROTATED.get(site)) if basis is not None},
    }
    if site in SPECTRUM:
        energy = kept.views[SPECTRUM[site]].energy
        found["eigenvalues"] = rounded(energy.view(heads, -1).mean(0))  # a head's principal axes are sorted by themselves
    if site in SITE_NORM:
        found["norm_spread"] = log_spread(source.tensor(f"{source.architecture.block_prefix(index)}{NORMS[SITE_NORM[site]]}.weight"))
    return found


def rounded(values: torch.Tensor) -> list[float]:
    """Numbers as JSON keeps them, with DIGITS significant digits."""
    return [float(f"{value:.{DIGITS}g}") for value in values.tolist()]
