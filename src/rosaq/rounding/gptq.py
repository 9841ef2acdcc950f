"""GPTQ (arXiv:2210.17323): rounding one channel at a time, the channels still to come making up for the error.

The salient channels come last and are not rounded, so they take up what is left of the error: with the second moment
H = X^T X of the inputs that is the least-squares fit of the precise part to the rounded one. Shape letters: N outputs,
J channels in the order of rounding (quantized ones first, then salient ones), Q quantized channels, G groups, C the
channels that are rounded before their errors go to all that follow.
"""

import functools
from collections.abc import Callable

import torch

from rosaq.layout import LinearLayout
from rosaq.rounding.grid import grouped

DAMPING = 0.01  # of the mean diagonal of H, added to it
Fit = Callable[[torch.Tensor, int], tuple[torch.Tensor, torch.Tensor]]


def gptq(weight_NK: torch.Tensor, moment_KK: torch.Tensor, layout: LinearLayout, fit: Fit, act_order: bool = False) -> tuple[torch.Tensor, ...]:
    """Round a weight with error feedback.

    Args:
        weight_NK: the weight; rows do not see each other, so layers with the same inputs may be stacked.
        moment_KK: second moment of its inputs, in the same basis and order of channels.
        layout: form of the layer.
        fit: scale and zero point (N, 1), of a group's weights (N, 1, C) and the group's number.
        act_order: round the channels of the largest second moment first. A group's channels are then rounded far
            apart, so all grids are fitted beforehand, to the weights as they are ("static groups").

    Returns:
        Codes (N, Q), scales and zero points (N, G), and the salient weights (N, S), changed by the feedback.

    Raises:
        ValueError: the moment is not positive definite even after damping.
    """
    device, top = weight_NK.device, (1 << layout.bits) - 1
    salient, quantized = layout.salient_columns().to(device), layout.quantized_columns().to(device)
    rank_Q = torch.arange(len(quantized), device=device)
    grids: list[tuple[torch.Tensor, torch.Tensor]] = []
    if act_order:
        rank_Q = moment_KK.diagonal()[quantized].argsort(descending=True, stable=True)
        weight = grouped(weight_NK[:, quantized], layout)
        grids = [fit(weight[:, group : group + 1], group) for group in range(layout.groups)]
        static = [torch.cat(parts, 1)[:, layout.column_groups().to(device)[rank_Q]].T.contiguous() for parts in zip(*grids, strict=True)]
    order_J = torch.cat([quantized[rank_Q], salient])
    weight_JN = weight_NK[:, order_J].T.contiguous()
    factor_JJ = inverse_factor(moment_KK[order_J][:, order_J]).to(weight_JN)
    codes, start = [], 0
    for group, length in enumerate(torch.bincount(layout.column_groups()).tolist()):
        stop = start + length
        if act_order:
            scale_CN, zero_CN = (grid_QN[start:stop] for grid_QN in static)
        else:
            grids.append(fit(weight_JN[start:stop].T[:, None], group))
            scale_CN, zero_CN = (grid.T.expand(length, -1) for grid in grids[-1])
        codes.append(_round_group(weight_JN, factor_JJ, start, scale_CN, zero_CN, top))
        start = stop
    scale_NG, zero_NG = (torch.cat(parts, 1) for parts in zip(*grids, strict=True))
    return torch.cat(codes).T[:, rank_Q.argsort()], scale_NG, zero_NG, weight_JN[start:].T


def _round_group(
    weight_JN: torch.Tensor, factor_JJ: torch.Tensor, start: int, scale_CN: torch.Tensor, zero_CN: torch.Tensor, top: int
) -> torch.Tensor:
    """Round C columns from `start` on and hand their errors to all that follow, in place; the codes (C, N)."""
    stop = start + len(scale_CN)
    inputs = weight_JN[start:stop], factor_JJ[start:stop, start:stop], scale_CN, zero_CN
    if weight_JN.is_cuda:
        codes_CN, errors_CN = _recorded(*scale_CN.shape, top, weight_JN.dtype, weight_JN.device)(*inputs)
    else:
        codes_CN, errors_CN = _round_columns(*inputs, top)
    weight_JN[stop:] -= factor_JJ[start:stop, stop:].T @ errors_CN
    return codes_CN


def _round_columns(
    weight_CN: torch.Tensor, factor_CC: torch.Tensor, scale_CN: torch.Tensor, zero_CN: torch.Tensor, top: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Round C columns, each with the errors of those before it taken in, which changes the weight; codes and errors (C, N)."""
    codes_CN, errors_CN = torch.empty_like(weight_CN), torch.empty_like(weight_CN)
    columns = zip(weight_CN, factor_CC.diagonal(), scale_CN, zero_CN, codes_CN, errors_CN, strict=True)
    for column, (exact_N, divisor, scale_N, zero_N, code_N, error_N) in enumerate(columns):
        torch.div(exact_N, scale_N, out=code_N).add_(zero_N).round_().clamp_(0, top)
        torch.sub(exact_N, torch.sub(code_N, zero_N).mul_(scale_N), out=error_N).div_(divisor)
        weight_CN[column + 1 :].addr_(factor_CC[column, column + 1 :], error_N, alpha=-1)
    return codes_CN, errors_CN


class _Recorded:
    """`_round_columns` for groups of one form as a CUDA graph.

    Its thousand small kernels, one after the other, take a seventh of the time that way: what is left out is launching
    each from Python. What they compute is the same to the last bit.
    """

    def __init__(self, columns: int, outputs: int, top: int, dtype: torch.dtype, device: torch.device) -> None:
        weight, scale, zero = (torch.ones(columns, outputs, dtype=dtype, device=device) for _ in range(3))
        factor = torch.ones(columns, columns, dtype=dtype, device=device)
        self._inputs = weight, factor, scale, zero
        _round_columns(weight[:2], factor[:2, :2], scale[:2], zero[:2], top)  # kernels cannot be loaded while a graph is made
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.device(device), torch.cuda.graph(self._graph, capture_error_mode="thread_local"):  # the next block is read by other threads
            self._outputs = _round_columns(*self._inputs, top)

    def __call__(self, *inputs: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The codes, and the errors, which the next call changes."""
        for place, tensor in zip(self._inputs, inputs, strict=True):
            place.copy_(tensor)
        self._graph.replay()
        codes_CN, errors_CN = self._outputs
        return codes_CN.clone(), errors_CN


_recorded = functools.lru_cache(maxsize=8)(_Recorded)


def inverse_factor(moment_JJ: torch.Tensor) -> torch.Tensor:
    """The upper Cholesky factor of the inverse of a damped second moment, float64 (GPTQ, Algorithm 1).

    With the channels in reverse order H = L L^T, so H = U^-1 U^-T in theirs, and U, which is L^-1 reversed, is the factor:
    one triangular inverse instead of a whole one and its factorization. Memory: two matrices beside the moment, which
    are large where J is (6.6 GB each for the 28672 channels of a 70B model).
    """
    reversed_JJ = moment_JJ.flip(0, 1).double()
    diagonal = reversed_JJ.diagonal()
    diagonal += DAMPING * diagonal.mean()
    lower_JJ, failed = torch.linalg.cholesky_ex(reversed_JJ)
    del reversed_JJ, diagonal
    if int(failed):
        raise ValueError("the second moment of the inputs is not positive definite; calibrate on more or other text")
    inverse_JJ = torch.eye(len(lower_JJ), dtype=torch.float64, device=lower_JJ.device)
    torch.linalg.solve_triangular(lower_JJ, inverse_JJ, upper=False, out=inverse_JJ)
    del lower_JJ
    return inverse_JJ.flip(0, 1)
