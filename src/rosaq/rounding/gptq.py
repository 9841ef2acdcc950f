"""GPTQ (arXiv:2210.17323): rounding one channel at a time, the channels still to come making up for the error.

The salient channels come last and are not rounded, so they take up what is left of the error: with the second moment
H = X^T X of the inputs that is the least-squares fit of the precise part to the rounded one. Shape letters: N outputs,
J channels in the order of rounding (quantized ones first, then salient ones), Q quantized channels, G groups.
"""

import torch

from rosaq.layout import LinearLayout
from rosaq.rounding.grid import fit_grid

DAMPING = 0.01  # of the mean diagonal of H, added to it


def gptq(weight_NK: torch.Tensor, moment_KK: torch.Tensor, layout: LinearLayout) -> tuple[torch.Tensor, ...]:
    """Round a weight with error feedback.

    Args:
        weight_NK: the weight.
        moment_KK: second moment of its inputs, in the same basis and order of channels.
        layout: form of the layer.

    Returns:
        Codes (N, Q), scales and zero points (N, G), and the salient weights (N, S), changed by the feedback.

    Raises:
        ValueError: the moment is not positive definite even after damping.
    """
    salient, quantized = layout.salient_columns(), layout.quantized_columns()
    order = torch.cat([quantized, salient]).to(weight_NK.device)
    weight_NJ = weight_NK[:, order].clone()
    factor_JJ = inverse_factor(moment_KK[order][:, order]).to(weight_NJ)
    codes, scales, zeros = [], [], []
    start = 0
    for length in torch.bincount(layout.column_groups()).tolist():
        stop = start + length
        scale_N1, zero_N1 = fit_grid(weight_NJ[:, None, start:stop], layout.bits)
        errors_NC = torch.empty_like(weight_NJ[:, start:stop])
        for column in range(start, stop):
            exact_N = weight_NJ[:, column]
            code_N = torch.round(exact_N / scale_N1[:, 0] + zero_N1[:, 0]).clamp(0, (1 << layout.bits) - 1)
            error_N = (exact_N - (code_N - zero_N1[:, 0]) * scale_N1[:, 0]) / factor_JJ[column, column]
            weight_NJ[:, column:stop] -= error_N[:, None] * factor_JJ[column, column:stop]
            errors_NC[:, column - start] = error_N
            codes.append(code_N)
        weight_NJ[:, stop:] -= errors_NC @ factor_JJ[start:stop, stop:]
        scales.append(scale_N1)
        zeros.append(zero_N1)
        start = stop
    return torch.stack(codes, 1), torch.cat(scales, 1), torch.cat(zeros, 1), weight_NJ[:, quantized.numel() :]


def inverse_factor(moment_JJ: torch.Tensor) -> torch.Tensor:
    """The upper Cholesky factor of the inverse of a damped second moment, float64 (GPTQ, Algorithm 1)."""
    damped = moment_JJ.double().clone()
    diagonal = damped.diagonal()
    diagonal += DAMPING * diagonal.mean()
    lower, failed = torch.linalg.cholesky_ex(damped)
    if int(failed):
        raise ValueError("the second moment of the inputs is not positive definite; calibrate on more or other text")
    return torch.linalg.cholesky(torch.cholesky_inverse(lower), upper=True)
