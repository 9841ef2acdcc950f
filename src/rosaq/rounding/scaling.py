"""AWQ's search for per-channel scales (arXiv:2306.00978, section 3.2); ROSAQ uses it for W_down (App. G).

The exponents, the scale's middle and the criterion's meaning are the paper's. What differs: the loss is the squared
error of the linear layers that a site feeds, summed, where AWQ's code runs the whole attention or feed-forward module;
and query heads that share a key-value head share its scales, where AWQ's code leaves such models' W_O unscaled.
Shape letters: N outputs, K inputs, P sampled tokens.
"""

from collections.abc import Callable

import torch

STEPS = 20  # exponents tried: 0, 1/20, ... 19/20
Loss = Callable[[torch.Tensor], float]


def sample_loss(sample_PK: torch.Tensor) -> Loss:
    """||X E^T||_F^2 of an error E (N, K) of the weight, over sampled inputs X."""
    return lambda error_NK: float((sample_PK @ error_NK.T).square().sum(dtype=torch.float64))


def moment_loss(moment_KK: torch.Tensor) -> Loss:
    """tr(E M E^T), the same over all tokens at once: M is their second moment.

    Losses are compared, so on a GPU TF32 products will do: each is off by a thousandth, their sum by far less.
    """

    def loss(error_NK: torch.Tensor) -> float:
        before = torch.backends.cuda.matmul.allow_tf32
        torch.backends.cuda.matmul.allow_tf32 = True
        try:
            return float((error_NK @ moment_KK.to(error_NK)).mul_(error_NK).sum(dtype=torch.float64))
        finally:
            torch.backends.cuda.matmul.allow_tf32 = before

    return loss


def search_scale(weight_NK: torch.Tensor, magnitude_K: torch.Tensor, loss: Loss, rounded: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
    """The scale s = magnitude^alpha, by its geometric middle, that loses least: loss(round(W diag(s)) diag(1/s) - W).

    Args:
        weight_NK: the weight; those of all layers that the inputs feed, stacked.
        magnitude_K: mean |x| per input channel.
        loss: of an error of the weight.
        rounded: what rounding makes of a weight.

    Returns:
        The scale (K,), all ones where no exponent is better than none.
    """
    best, best_loss = torch.ones_like(magnitude_K), float("inf")
    for step in range(STEPS):
        scale = magnitude_K.clamp_min(1e-8).pow(step / STEPS)
        scale = (scale / (scale.max() * scale.min()).sqrt()).clamp_min(1e-4)
        lost = loss(rounded(weight_NK * scale) / scale - weight_NK)
        if lost < best_loss:
            best, best_loss = scale, lost
    return best
