"""`HadamardLinear`: a quantized linear layer whose input is multiplied by a Hadamard matrix first (down_rotation "hadamard")."""

import torch

from rosaq.hadamard import hadamard_transform
from rosaq.linear import RosaqLinear


class HadamardLinear(RosaqLinear):
    """y = (x H / sqrt(K)) W^T + b: the online rotation R4 of QuaRot and SpinQuant, whose inverse W has absorbed.

    It holds the tensors of `RosaqLinear` and nothing more: H follows from the width. Whoever takes the weight out of
    it, to multiply x itself, has to take `hadamard_transform(W, inverse=True)`.
    """

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """The product (..., N) in the type of x."""
        return super().forward(hadamard_transform(x))
