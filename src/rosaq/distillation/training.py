"""Training a student on what its teacher predicts: KL(teacher || student) over all tokens, by Adam."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import torch

from rosaq.clock import Progress
from rosaq.distillation.trainable import PARTS, TrainableLinear

CHUNK_BYTES = 10**9  # of one float32 matrix of logits; about six are held at a time
BETAS = (0.9, 0.95)
WARM_UP = 20  # the rates rise over a 20th of the steps
BASE_WIDTH = 576  # of the model that the learning rates were chosen on
CLIP = 1.0  # norm of the gradient of all parameters


@dataclass(frozen=True)
class Settings:
    """How to train.

    Attributes:
        epochs: times that every window is seen.
        batch: windows a step.
        held_out: further windows, never trained on, that the divergence is measured on before and after.
        learning_rates: of the scales (relative to their first values), of the salient weights (of a model up to BASE_WIDTH wide;
            of a wider one it falls as 1 / width), of the norm weights, of the codes (in steps of their grids); 0 leaves a part
            as it is. They rise at first and then fall by a cosine.
    """

    epochs: int = 1
    batch: int = 8
    held_out: int = 8
    learning_rates: tuple[float, float, float, float] = (3e-3, 1.5e-4, 3e-3, 0)

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
    groups = list(_parameter_groups(parameters, settings.learning_rates, student.config.hidden_size))
    trained = [parameter for group in groups for parameter in group["params"]]
    optimizer = torch.optim.Adam(groups, betas=BETAS)
    steps = settings.epochs * (len(windows) // settings.batch)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: rate_factor(step, steps))
    losses: list[float] = []
    heads = head_weight(student), head_weight(teacher)
    with _tensor_cores(student.device):
        for rows in _batches(windows, settings, seed):
            optimizer.zero_grad(set_to_none=True)
            losses.append(_accumulate(student, teacher, heads, rows))
            if not math.isfinite(losses[-1]):
                raise ValueError(f"step {len(losses)} of distillation: the divergence is {losses[-1]}; lower the learning rates")
            torch.nn.utils.clip_grad_norm_(trained, CLIP)
            optimizer.step()
            schedule.step()
            progress("training", len(losses), steps)
    return losses


def _parameter_groups(parameters: dict[str, list[torch.nn.Parameter]], rates: tuple[float, ...], width: int) -> Iterator[dict[str, Any]]:
    """What is trained at which rate.

    Adam moves every weight alike, whatever its gradient is, and a wide layer adds up more of them, while each is smaller: at one
    rate for all widths Llama-2-7B's shape got worse. 1 / width is the rule of Tensor Programs V (arXiv 2203.03466, table 3). It is
    not followed to narrow models: one 256 wide got worse at more than the rate itself.
    """
    for part, rate in zip(PARTS, rates, strict=True):
        if rate and parameters[part]:
            yield {"params": parameters[part], "lr": rate * min(1.0, BASE_WIDTH / width) if part == "salient" else rate}


def rate_factor(step: int, steps: int) -> float:
    """Share of the learning rate at a step, counted from 0: a linear rise, times a cosine from 1 to 0."""
    return min(1.0, (step + 1) / max(1, steps // WARM_UP)) * 0.5 * (1 + math.cos(math.pi * step / steps))


def _batches(windows: torch.Tensor, settings: Settings, seed: int) -> Iterator[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    for _ in range(settings.epochs):
        for rows in torch.randperm(len(windows), generator=generator).split(settings.batch):
            if len(rows) == settings.batch:
                yield windows[rows]


@contextmanager
def _tensor_cores(device: torch.device) -> Iterator[None]:
    """On a GPU: float32 products in TF32, attention in bfloat16."""
    if device.type != "cuda":
        yield
        return
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        with torch.autocast("cuda", torch.bfloat16):
            yield
    finally:
        torch.set_float32_matmul_precision(before)


def head_weight(model: Any) -> torch.Tensor:
    """The weight (V, D) of lm_head, float32."""
    head = model.get_output_embeddings()
    weight_VD = head.weight(torch.float32) if isinstance(head, TrainableLinear) else head.weight.detach()
    return weight_VD.float()


def _accumulate(student: Any, teacher: Any, heads: tuple[torch.Tensor, torch.Tensor], windows: torch.Tensor) -> float:
    """Add the gradient of the mean divergence over windows (S, T) to the parameters; one at a time on the CPU."""
    total = 0.0
    for rows in windows.to(student.device).split(len(windows) if student.device.type == "cuda" else 1):
        with torch.no_grad():
            wanted_TD = teacher.model(rows, use_cache=False).last_hidden_state.flatten(0, 1).float()
        found_TD = student.model(rows, use_cache=False).last_hidden_state.flatten(0, 1).float()
        loss = HeadDivergence.apply(found_TD, wanted_TD, *heads) * (len(rows) / len(windows))
        loss.backward()
        total += float(loss.detach())
    return total


class HeadDivergence(torch.autograd.Function):
    """Mean over tokens of KL(teacher || student) in nats, from what both have before lm_head, some tokens at a time.

    The derivative by the student's logits is softmax(logits) - softmax(the teacher's), so it is taken at once and no logits are kept.
    """

    @staticmethod
    def forward(ctx: Any, found_TD: torch.Tensor, wanted_TD: torch.Tensor, head_VD: torch.Tensor, teacher_head_VD: torch.Tensor) -> torch.Tensor:
        """The divergence; its gradient is made here, too."""
        total, gradients = found_TD.new_zeros((), dtype=torch.float64), []
        count = max(1, CHUNK_BYTES // (4 * head_VD.shape[0]))
        with torch.autocast(found_TD.device.type, enabled=False):
            for found, wanted in zip(found_TD.split(count), wanted_TD.split(count), strict=True):
                log_q = (found @ head_VD.T).log_softmax(-1)
                log_p = (wanted @ teacher_head_VD.T).log_softmax(-1)
                p = log_p.exp()
                total += (p * log_p.sub_(log_q)).sum(dtype=torch.float64)
                gradients.append((log_q.exp_() - p) @ head_VD)
        ctx.save_for_backward(torch.cat(gradients) / len(found_TD))
        return (total / len(found_TD)).to(found_TD.dtype)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """Gradient of the student's part."""
        return ctx.saved_tensors[0] * gradients[0], None, None, None
