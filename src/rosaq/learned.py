"""SpinQuant: rotations learned by Cayley SGD on the Stiefel manifold (arXiv:2405.16406, Eq. 2 and 3), for weights alone.

The loss is the next-token cross-entropy of the model with its linear weights rounded to nearest on the recipe's own grid,
the gradient passing straight through the rounding. Only R1 (the residual stream's basis) and R2 (one per block and
key-value head) change; embedding and lm_head are not rounded meanwhile. Shape letters: L blocks, D hidden,
H key-value heads, E head size, S windows, B windows of a batch, T tokens, V vocabulary.
"""

import json
import math
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.checkpoint import checkpoint

from rosaq.architecture import LINEARS
from rosaq.clock import Progress
from rosaq.layout import LinearLayout
from rosaq.recipe import Recipe
from rosaq.rotation import Block, absorb_heads, absorb_residual, fold_norms, rotate_down
from rosaq.rounding.grid import round_to_nearest
from rosaq.skeleton import BlockRunner
from rosaq.source import Source

BATCH = 8  # windows of a step; the paper's 800 samples are 100 steps of these
HELD_OUT = 16  # one window of so many is never learned from
# What a learned rotation depends on besides model and windows.
DEPENDS_ON = ("bits", "group_size", "head_rotation", "down_rotation", "learning_steps", "learning_rate", "seed")


@dataclass(frozen=True)
class Learned:
    """Rotations that were learned, and how it went.

    Attributes:
        residual: R1 (D, D), float64, on the CPU.
        heads: R2 (L, H, E, E), float64, on the CPU; None where the heads keep their own basis.
        record: JSON-able: `losses` of the steps, each on its batch before the step, in nats per token;
            `held_out_before` and `held_out_after` on windows that were not learned from; numbers of windows;
            `orthogonality_error`, the largest |R^T R - I|.
    """

    residual: torch.Tensor
    heads: torch.Tensor | None
    record: dict[str, Any]

    def tensors(self) -> dict[str, torch.Tensor]:
        """All of it as tensors by name, to be kept in a file."""
        record = torch.tensor(list(json.dumps(self.record).encode()), dtype=torch.uint8)
        heads = {} if self.heads is None else {"heads": self.heads}
        return {"residual": self.residual, "record": record, **heads}

    @classmethod
    def from_tensors(cls, tensors: dict[str, torch.Tensor]) -> "Learned":
        """What `tensors` gave."""
        return cls(tensors["residual"], tensors.get("heads"), json.loads(bytes(tensors["record"].tolist())))


def learning_key(recipe: Recipe) -> tuple[Any, ...]:
    """What tells the rotations apart that are learned for a model from the same windows."""
    return tuple(getattr(recipe, name) for name in DEPENDS_ON)


class QuantizedModel:
    """The model with rounded weights, as a differentiable function of its rotations.

    Device memory: the source's weights in their own type, B T D activations for each block, one block's weights about
    six times in float32 with its activations, and one window's logits: each block runs again for its gradient. By this
    count a 7B model in bfloat16 takes about 30 GB at B = 8, T = 2048.

    Args:
        source: the model.
        recipe: how its weights are rounded, and whether W_down's input is rotated online.
        layouts: form of each linear layer by role.
        seq_len: tokens T of a window.
        device: where to compute. On a GPU blocks run in bfloat16, as in the paper, and rotations and roundings in float32
            with TF32 products; on the CPU all is float32.
    """

    def __init__(self, source: Source, recipe: Recipe, layouts: dict[str, LinearLayout], seq_len: int, device: str) -> None:
        """Bring the weights to the device."""
        self.architecture, self.device, self._recipe, self._layouts = source.architecture, device, recipe, layouts
        self._dtype = torch.bfloat16 if device.startswith("cuda") else torch.float32
        self._runner = BlockRunner(source.config, seq_len, self._dtype, device)
        self._blocks = [{name: tensor.to(device) for name, tensor in source.block(i).items()} for i in range(self.architecture.layers)]
        self._embedding = source.embedding().to(device)
        self._head = (source.head().float() * source.final_norm().float()).to(device, self._dtype)
        self._epsilon = float(source.config.rms_norm_eps)

    def loss(self, windows_BT: torch.Tensor, residual_DD: torch.Tensor, heads_LHEE: torch.Tensor | None) -> torch.Tensor:
        """Mean cross-entropy of the next token, in nats, with the weights rotated (float32) and rounded."""
        windows_BT = windows_BT.to(self.device)
        x_BTD = (torch.nn.functional.embedding(windows_BT, self._embedding).float() @ residual_DD).to(self._dtype)
        for index in range(self.architecture.layers):
            heads = None if heads_LHEE is None else heads_LHEE[index]
            x_BTD = checkpoint(self._block, index, x_BTD, residual_DD, heads, use_reentrant=False, preserve_rng_state=False)
        losses = [
            checkpoint(self._window_loss, x_TD, window_T, residual_DD, use_reentrant=False, preserve_rng_state=False)
            for x_TD, window_T in zip(x_BTD, windows_BT, strict=True)
        ]
        return torch.stack(losses).mean()

    def _block(self, index: int, x_BTD: torch.Tensor, residual_DD: torch.Tensor, heads_HEE: torch.Tensor | None) -> torch.Tensor:
        block = {name: tensor.float() for name, tensor in self._blocks[index].items()}
        block = absorb_residual(fold_norms(block), residual_DD)
        if heads_HEE is not None:
            block = absorb_heads(block, heads_HEE, self.architecture)
        return self._runner.call(index, self._rounded(block), x_BTD)

    def _rounded(self, block: Block) -> Block:
        """The weights after rounding to nearest, as their gradient sees them: not rounded at all."""
        online = self._recipe.down_rotation == "hadamard"
        rounded = dict(rotate_down(block)) if online else dict(block)
        for role, module in LINEARS.items():
            weight = rounded[f"{module}.weight"]
            with torch.no_grad():
                error = round_to_nearest(weight, self._layouts[role]) - weight
            rounded[f"{module}.weight"] = weight + error
        return rotate_down(rounded, inverse=True) if online else rounded

    def _window_loss(self, x_TD: torch.Tensor, window_T: torch.Tensor, residual_DD: torch.Tensor) -> torch.Tensor:
        normed_TD = torch.nn.functional.rms_norm(x_TD.float(), x_TD.shape[-1:], eps=self._epsilon) @ residual_DD.T
        logits_TV = normed_TD.to(self._dtype) @ self._head.T
        return torch.nn.functional.cross_entropy(logits_TV[:-1].float(), window_T[1:])


def learn(
    model: QuantizedModel, start: tuple[torch.Tensor, torch.Tensor | None], windows: torch.Tensor, recipe: Recipe, progress: Progress
) -> Learned:
    """Learn the rotations of a recipe.

    Args:
        model: the model on the recipe's grid.
        start: R1 (D, D) and R2 (L, H, E, E) or None, orthogonal; R2 changes only with head_rotation "learned".
        windows: token ids (S, T); one in HELD_OUT is kept aside, the last ones.
        recipe: steps, learning rate and seed.
        progress: called as ("learning", step, steps).

    Raises:
        ValueError: fewer than two windows, or a loss that is not finite.
    """
    if len(windows) < 2:
        raise ValueError(
            f"a rotation cannot be learned from {len(windows)} calibration window; one is learned from and one kept aside: give --samples 2"
        )
    kept = max(1, len(windows) // HELD_OUT)
    training, held_out = windows[:-kept], windows[-kept:]
    residual = start[0].to(model.device, torch.float64)
    heads = None if start[1] is None else start[1].to(model.device, torch.float64)
    losses = []
    with gpu_arithmetic(model.device):
        before = _held_out_loss(model, held_out, residual, heads)
        for step, rows in enumerate(_batches(len(training), recipe)):
            variables = [residual.float().requires_grad_()]
            if heads is not None:
                variables.append(heads.float().requires_grad_(recipe.head_rotation == "learned"))
            loss = model.loss(training[rows], variables[0], variables[1] if heads is not None else None)
            losses.append(loss.item())
            if not math.isfinite(losses[-1]):
                raise ValueError(f"learning step {step + 1}: the loss is {losses[-1]}; give a lower learning_rate than {recipe.learning_rate}")
            loss.backward()
            rate = recipe.learning_rate * (1 - step / recipe.learning_steps)
            residual = cayley_step(residual, _gradient(variables[0]), rate)
            if heads is not None and variables[1].grad is not None:
                heads = cayley_step(heads, _gradient(variables[1]), rate)
            progress("learning", step + 1, recipe.learning_steps)
        residual, heads = orthonormal(residual), None if heads is None else orthonormal(heads)
        after = _held_out_loss(model, held_out, residual, heads)
    record = {
        "losses": losses, "held_out_before": before, "held_out_after": after, "windows": len(training), "held_out_windows": kept,
        "batch_windows": min(BATCH, len(training)), "orthogonality_error": max(_error(basis) for basis in (residual, heads) if basis is not None),
    }  # fmt: skip
    return Learned(residual.cpu(), None if heads is None else heads.cpu(), record)


def cayley_step(basis: torch.Tensor, gradient: torch.Tensor, rate: float) -> torch.Tensor:
    """One step of descent that stays orthogonal: R <- (I - a/2 W)^-1 (I + a/2 W) R (SpinQuant Eq. 2 and 3).

    W = Y^T - Y with Y = G R^T / 2, to which the paper's projection comes down for a square R. The step a is the rate, but
    at most 1 / ||W||_1, as in the Cayley SGD that the paper builds on (Li et al., ICLR 2020): no axis turns by more
    than about a radian. The system is solved exactly, so that no error adds up over the steps.

    Args:
        basis: R (..., n, n), float64.
        gradient: G (..., n, n) of the loss, float64.
        rate: learning rate of the step.
    """
    half = 0.5 * gradient @ basis.mT
    skew = half.mT - half
    length = torch.clamp(1 / skew.abs().sum(-2).amax(-1).clamp_min(1e-30), max=rate)[..., None, None]
    turn = 0.5 * length * skew
    unit = torch.eye(basis.shape[-1], dtype=basis.dtype, device=basis.device)
    return torch.linalg.solve(unit - turn, (unit + turn) @ basis)


def orthonormal(basis: torch.Tensor) -> torch.Tensor:
    """A nearly orthogonal matrix (..., n, n) made orthogonal to rounding: R (3 I - R^T R) / 2, a Newton-Schulz step."""
    unit = torch.eye(basis.shape[-1], dtype=basis.dtype, device=basis.device)
    return basis @ (3 * unit - basis.mT @ basis) / 2


def _gradient(variable: torch.Tensor) -> torch.Tensor:
    assert variable.grad is not None
    return variable.grad.double()


def _error(basis: torch.Tensor) -> float:
    unit = torch.eye(basis.shape[-1], dtype=basis.dtype, device=basis.device)
    return float((basis.mT @ basis - unit).abs().max())


def _batches(windows: int, recipe: Recipe) -> Iterator[torch.Tensor]:
    """Which windows each step learns from: all of them in a random order, then again in another."""
    generator = torch.Generator().manual_seed(recipe.seed)
    size = min(BATCH, windows)
    epochs = -(-recipe.learning_steps * size // windows)
    order = torch.cat([torch.randperm(windows, generator=generator) for _ in range(epochs)])
    return iter(order[: recipe.learning_steps * size].split(size))


@torch.no_grad()
def _held_out_loss(model: QuantizedModel, windows: torch.Tensor, residual: torch.Tensor, heads: torch.Tensor | None) -> float:
    bases = (residual.float(), None if heads is None else heads.float())
    return sum(model.loss(rows, *bases).item() * len(rows) for rows in windows.split(BATCH)) / len(windows)


@contextmanager
def gpu_arithmetic(device: str) -> Iterator[None]:
    """On a GPU, TF32 products (their error is a thousandth, the grid's step a tenth of a weight), and the same ones every time."""
    if not device.startswith("cuda"):
        yield
        return
    before = torch.get_float32_matmul_precision(), torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    try:
        torch.set_float32_matmul_precision("high")
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*deterministic")  # cuBLAS is, on the one stream that is used here
            torch.use_deterministic_algorithms(True, warn_only=True)
            yield
    finally:
        torch.set_float32_matmul_precision(before[0])
        torch.use_deterministic_algorithms(before[1], warn_only=before[2])
