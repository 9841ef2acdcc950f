"""`RotatedNorm`: an RMSNorm followed by a rotation, for recipes whose basis cannot be absorbed (rotation "per-layer")."""

import torch


class RotatedNorm(torch.nn.Module):
    """y = norm(x) R, where the norm's own weight is folded into the linear layers behind it.

    Args:
        norm: the model's norm module.
        hidden: channels D.
        device: where the rotation is made; it is uninitialised until loaded.
    """

    def __init__(self, norm: torch.nn.Module, hidden: int, device: torch.device | str | None = None) -> None:
        """Take over the norm's weight under its own name."""
        super().__init__()
        assert isinstance(norm.weight, torch.nn.Parameter)
        self.weight = norm.weight
        self.variance_epsilon = float(norm.variance_epsilon)  # type: ignore[arg-type]
        self.register_buffer("rotation", torch.empty(hidden, hidden, dtype=torch.float16, device=device))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Y (..., D) in the type of x."""
        normed = torch.nn.functional.rms_norm(x.float(), x.shape[-1:], self.weight.float(), self.variance_epsilon).to(x.dtype)
        return normed @ self.get_buffer("rotation").to(x.dtype)
