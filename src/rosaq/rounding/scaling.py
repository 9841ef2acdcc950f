"""AWQ's search for per-channel scales (arXiv:2306.00978, section 3.2), as ROSAQ uses it for W_down (App. G)."""

from collections.abc import Callable

import torch

STEPS = 20  # exponents tried: 0, 1/20, ... 19/20


def search_scale(
    weight_NK: torch.Tensor,
    magnitude_K: torch.Tensor,
    sample_PK: torch.Tensor,
    rounded: Callable[[torch.Tensor], torch.Tensor],
) -> torch.Tensor:
    """The scale s = magnitude^alpha, by its geometric middle, that loses least of the layer's output.

    The loss is ||X (round(W diag(s)) diag(1/s) - W)^T||_F^2 over the sampled inputs.

    Args:
        weight_NK: the weight.
        magnitude_K: mean |x| per input channel.
        sample_PK: inputs of P tokens.
        rounded: what rounding makes of a weight.

    Returns:
        The scale (K,), all ones where no exponent is better than none.
    """
    best, best_loss = torch.ones_like(magnitude_K), float("inf")
    for step in range(STEPS):
        scale = magnitude_K.clamp_min(1e-8).pow(step / STEPS)
        scale = (scale / (scale.max() * scale.min()).sqrt()).clamp_min(1e-4)
        error_NK = rounded(weight_NK * scale) / scale - weight_NK
        loss = float((sample_PK @ error_NK.T).square().sum(dtype=torch.float64))
        if loss < best_loss:
            best, best_loss = scale, loss
    return best
