"""`HadamardLinear`: a quantized linear layer whose input is multiplied by a Hadamard matrix first (down_rotation "hadamard")."""

import torch

from rosaq.hadamard import hadamard_transform
from rosaq.linear import RosaqLinear


class HadamardLinear(RosaqLinear):
    """y = (x H / sqrt(K)) W^T + b: the online rotation R4 of QuaRot and SpinQuant, whose inverse W has absorbed.

    It holds the tensors of `RosaqLinear` and nothing more: H follows from the width.
    """

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """The product (..., N) in the type of x."""
        return super().forward(hadamard_transform(x))

    def dense_weight(self, dtype: torch.dtype) -> torch.Tensor:
        """The weight (N, K) that takes x itself: W H^T / sqrt(K)."""
        return hadamard_transform(super().dense_weight(torch.float32), inverse=True).to(dtype)
