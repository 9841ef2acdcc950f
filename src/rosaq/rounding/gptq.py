"""GPTQ (arXiv:2210.17323): rounding one channel at a time, the channels still to come making up for the error.

The salient channels come last and are not rounded, so they take up what is left of the error: with the second moment
H = X^T X of the inputs that is the least-squares fit of the precise part to the rounded one. Shape letters: N outputs,
J channels in the order of rounding (quantized ones first, then salient ones), Q quantized channels, G groups, C the
channels that are rounded before their errors go to all that follow.
"""

from collections.abc import Callable

import torch

from rosaq.layout import LinearLayout
from rosaq.rounding.columns import round_columns
from rosaq.rounding.grid import grouped

DAMPING = 0.01  # of the mean diagonal of H, added to it
Fit = Callable[[torch.Tensor, int, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]


def gptq(weight_NK: torch.Tensor, moment_KK: torch.Tensor, layout: LinearLayout, fit: Fit, act_order: bool = False) -> tuple[torch.Tensor, ...]:
    """Round a weight with error feedback.

    Args:
        weight_NK: the weight; rows do not see each other, so layers with the same inputs may be stacked.
        moment_KK: second moment of its inputs, in the same basis and order of channels.
        layout: form of the layer.
        fit: scale and zero point (N, 1), of a group's weights (N, 1, C), the group's number, and what an error of each of its
            channels counts (C,): the variance of the channel given those to come.
        act_order: round the channels of the largest second moment first. A group's channels are then rounded far
            apart, so all grids are fitted beforehand, to the weights as they are ("static groups").

    Returns:
        Codes (N, Q), scales and zero points (N, G), and the salient weights (N, S), changed by the feedback.

    Raises:
        ValueError: the moment is zero, or not positive definite even after damping.
    """
    device, top = weight_NK.device, (1 << layout.bits) - 1
    salient, quantized = layout.salient_columns(device), layout.quantized_columns(device)
    rank_Q = torch.arange(len(quantized), device=device)
    if act_order:
        rank_Q = moment_KK.diagonal()[quantized].argsort(descending=True, stable=True)
    order_J = torch.cat([quantized[rank_Q], salient])
    weight_JN = weight_NK[:, order_J].T.contiguous()
    factor_JJ = inverse_factor(moment_KK[order_J][:, order_J]).to(weight_JN)
    counts_Q = factor_JJ.diagonal()[rank_Q.argsort()].pow(-2)  # in the order of the channels
    grids: list[tuple[torch.Tensor, torch.Tensor]] = []
    if act_order:
        weight, counts_GC = grouped(weight_NK[:, quantized], layout), grouped(counts_Q[None], layout)[0]
        grids = [fit(weight[:, group : group + 1], group, counts_GC[group]) for group in range(layout.groups)]
        static = [torch.cat(parts, 1)[:, layout.column_groups(device)[rank_Q]].T.contiguous() for parts in zip(*grids, strict=True)]
    codes = []
    for group, own in enumerate(layout.group_slices()):
        if act_order:
            scale_CN, zero_CN = (grid_QN[own] for grid_QN in static)
        else:
            grids.append(fit(weight_JN[own].T[:, None], group, counts_Q[own]))
            scale_CN, zero_CN = (grid.T.expand(own.stop - own.start, -1) for grid in grids[-1])
        codes.append(round_columns(weight_JN, factor_JJ, own.start, scale_CN, zero_CN, top))
    scale_NG, zero_NG = (torch.cat(parts, 1) for parts in zip(*grids, strict=True))
    return torch.cat(codes).T[:, rank_Q.argsort()], scale_NG, zero_NG, weight_JN[len(quantized) :].T


def inverse_factor(moment_JJ: torch.Tensor) -> torch.Tensor:
    """The upper Cholesky factor of the inverse of a damped second moment, float64 (GPTQ, Algorithm 1).

    It is L^-1 of `reversed_factor`, reversed: one triangular inverse instead of a whole one and its factorization. Memory: two matrices
    beside the moment, which are large where J is (6.6 GB each for the 28672 channels of a 70B model).
    """
    lower_JJ = reversed_factor(moment_JJ)
    inverse_JJ = torch.eye(len(lower_JJ), dtype=torch.float64, device=lower_JJ.device)
    torch.linalg.solve_triangular(lower_JJ, inverse_JJ, upper=False, out=inverse_JJ)
    del lower_JJ
    return inverse_JJ.flip(0, 1)


def conditional_variances(moment_JJ: torch.Tensor) -> torch.Tensor:
    """The variance (J,) of each channel given those behind it, float64: 1 / U_jj^2 of `inverse_factor`, without the inverse."""
    return reversed_factor(moment_JJ).diagonal().flip(0).square()


def reversed_factor(moment_JJ: torch.Tensor) -> torch.Tensor:
    """The lower Cholesky factor L of a damped second moment H with the channels in reverse order, float64.

    H = L L^T there, so H = U^-1 U^-T in the channels' own order, where U is L^-1 reversed.

    Raises:
        ValueError: the moment is zero, or not positive definite even after damping.
    """
    damping = damping_of(moment_JJ)
    if damping == 0:
        raise ValueError(
            "the inputs are zero, or count nothing, throughout the calibration text, so GPTQ has no error to feed back; "
            "calibrate on other text, or take a recipe with rounding 'nearest'"
        )
    reversed_JJ = moment_JJ.flip(0, 1).double()
    reversed_JJ.diagonal().add_(damping)
    lower_JJ, failed = torch.linalg.cholesky_ex(reversed_JJ)
    del reversed_JJ
    if int(failed):
        raise ValueError("the second moment of the inputs is not positive definite; calibrate on more or other text")
    return lower_JJ


def damping_of(moment_JJ: torch.Tensor) -> float:
    """What is added to the diagonal of a second moment: a share of its mean."""
    return DAMPING * float(moment_JJ.diagonal().mean(dtype=torch.float64))
