"""Training a student on what its teacher predicts: KL(teacher || student) over all tokens, by Adam."""

import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

import torch

from rosaq.clock import Progress
from rosaq.distillation.trainable import PARTS
from rosaq.evaluation.perplexity import LOGITS_BYTES

BETAS = (0.9, 0.95)
WARM_UP = 20  # the rates rise over a 20th of the steps
CLIP = 1.0  # norm of the gradient of all parameters


@dataclass(frozen=True)
class Settings:
    """How to train.

    Attributes:
        epochs: times that every window is seen.
        batch: windows a step.
        held_out: further windows, never trained on, that the divergence is measured on before and after.
        learning_rates: of the scales (relative to their first values), of the salient weights, of the norm weights; 0
            leaves a part as it is. They rise at first and then fall by a cosine.
    """

    epochs: int = 4
    batch: int = 8
    held_out: int = 8
    learning_rates: tuple[float, float, float] = (1e-3, 5e-5, 1e-3)

    def __post_init__(self) -> None:
        """Refuse what trains nothing."""
        for name in ("epochs", "batch", "held_out"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be 1 or more")
        rates = self.learning_rates
        if len(rates) != len(PARTS) or not all(0 <= rate < 1 for rate in rates) or not any(rates):
            raise ValueError(f"learning rates are {rates}; they must be {len(PARTS)} numbers of 0 or more and below 1, not all 0")

    def to_dict(self) -> dict[str, Any]:
        """All fields, JSON-able."""
        return {**asdict(self), "learning_rates": list(self.learning_rates)}


def train(
    student: Any,
    teacher: Any,
    parameters: dict[str, list[torch.nn.Parameter]],
    windows: torch.Tensor,
    settings: Settings,
    seed: int,
    progress: Progress,
) -> list[float]:
    """Train the student in place.

    Args:
        student: the model, with all but `parameters` frozen.
        teacher: the original, on the same device.
        parameters: by the names of PARTS.
        windows: token ids (S, T), at least one batch; of each epoch's last windows those that fill no batch are left out.
        settings: how.
        seed: of the order of the windows.
        progress: called as ("training", steps done, steps).

    Returns:
        Mean divergence per token of each step's windows before the step, in nats.

    Raises:
        ValueError: the divergence is not finite; names the step.
    """
    parts = [{"params": parameters[part], "lr": rate} for part, rate in zip(PARTS, settings.learning_rates, strict=True) if rate and parameters[part]]
    trained = [parameter for part in parts for parameter in part["params"]]  # type: ignore[attr-defined]
    optimizer = torch.optim.Adam(parts, betas=BETAS)
    steps = settings.epochs * (len(windows) // settings.batch)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: rate_factor(step, steps))
    losses: list[float] = []
    for rows in _batches(windows, settings, seed):
        optimizer.zero_grad(set_to_none=True)
        losses.append(_accumulate(student, teacher, rows))
        if not math.isfinite(losses[-1]):
            raise ValueError(f"step {len(losses)} of distillation: the divergence is {losses[-1]}; lower the learning rates")
        torch.nn.utils.clip_grad_norm_(trained, CLIP)
        optimizer.step()
        schedule.step()
        progress("training", len(losses), steps)
    return losses


def rate_factor(step: int, steps: int) -> float:
    """Share of the learning rate at a step, counted from 0: a linear rise, times a cosine from 1 to 0."""
    return min(1.0, (step + 1) / max(1, steps // WARM_UP)) * 0.5 * (1 + math.cos(math.pi * step / steps))


def _batches(windows: torch.Tensor, settings: Settings, seed: int) -> Iterator[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    for _ in range(settings.epochs):
        for rows in torch.randperm(len(windows), generator=generator).split(settings.batch):
            if len(rows) == settings.batch:
                yield windows[rows]


def _accumulate(student: Any, teacher: Any, windows: torch.Tensor) -> float:
    """Add the gradient of the mean divergence over windows (S, T) to the parameters; a few windows at a time, for their logits' memory."""
    total = 0.0
    for rows in windows.to(student.device).split(max(1, LOGITS_BYTES // (4 * windows.shape[1] * student.config.vocab_size))):
        with torch.no_grad():
            wanted = teacher(rows, use_cache=False).logits
        logits = student(rows, use_cache=False).logits
        loss = torch.stack([kl_divergence(p_TV, q_TV) for p_TV, q_TV in zip(wanted, logits, strict=True)]).sum() / len(windows)
        loss.backward()
        total += float(loss.detach())
    return total


def kl_divergence(wanted_TV: torch.Tensor, logits_TV: torch.Tensor) -> torch.Tensor:
    """Mean over tokens of KL(wanted || logits) in nats, in float32 or better."""
    dtype = torch.promote_types(logits_TV.dtype, torch.float32)
    log_p, log_q = wanted_TV.to(dtype).log_softmax(-1), logits_TV.to(dtype).log_softmax(-1)
    return torch.nn.functional.kl_div(log_q, log_p, reduction="batchmean", log_target=True)
