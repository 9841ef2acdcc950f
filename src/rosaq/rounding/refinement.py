"""Codes and scales once more, after GPTQ: each code by coordinate descent, all scales of a row by least squares.

GPTQ rounds each channel once and never looks back, and its scales are those that the weights' ranges ask for. Here the loss
tr(E M E^T) of the error E falls on: a sweep puts each code where the loss is least with all others fixed (coordinate
descent, as in QuantEase, arXiv:2309.01885), and the scales of a row, given its codes, are a least-squares problem of as
many unknowns as groups. The salient channels take up the rest throughout: they are left out by the Schur complement of the
moment. Shape letters: N outputs, K inputs, Q quantized and S salient channels, G groups, C channels at a time.
"""

import torch

from rosaq.layout import LinearLayout
from rosaq.rounding.columns import round_columns
from rosaq.rounding.gptq import damping_of

BLOCK = 64  # channels that a sweep rounds before all others hear of it
LARGEST = 2.0  # times that a scale may become larger or smaller
RIDGE = 1e-6  # of the mean diagonal of the scales' normal equations


def refine(
    weight_NK: torch.Tensor, moment_KK: torch.Tensor, layout: LinearLayout, rounded: tuple[torch.Tensor, ...], sweeps: int
) -> tuple[torch.Tensor, ...]:
    """Lower the loss of what GPTQ has rounded.

    Args:
        weight_NK: the weight as it was.
        moment_KK: second moment of its inputs.
        layout: form of the layer.
        rounded: codes (N, Q), scales and zero points (N, G), salient weights (N, S).
        sweeps: over all codes; the scales are fitted before, between and after.

    Returns:
        As `rounded`; the zero points are the same.
    """
    codes_NQ, scale_NG, zero_NG, _ = rounded
    device = weight_NK.device
    salient, quantized, groups = (layout.salient_columns(device), layout.quantized_columns(device), layout.column_groups(device))
    damping = damping_of(moment_KK)
    moment_QQ, moment_SS, crossed_SQ = (
        moment_KK[rows][:, columns] for rows, columns in ((quantized, quantized), (salient, salient), (salient, quantized))
    )
    moment_QQ.diagonal().add_(damping)
    moment_SS = moment_SS.double()
    moment_SS.diagonal().add_(damping)
    answer_SQ = torch.linalg.solve(moment_SS, crossed_SQ.double()).to(weight_NK)
    moment_QQ = moment_QQ.to(weight_NK).addmm_(crossed_SQ.T.to(weight_NK), answer_SQ, alpha=-1)  # in float32, the damping is far above its error
    wanted_NQ = weight_NK[:, quantized]
    codes_NQ, scale_NG = codes_NQ.to(weight_NK), _fit_scales(wanted_NQ, moment_QQ, codes_NQ - zero_NG[:, groups], scale_NG, layout)
    for _ in range(sweeps):
        codes_NQ = _sweep(wanted_NQ, moment_QQ, codes_NQ, (scale_NG[:, groups], zero_NG[:, groups]), (1 << layout.bits) - 1)
        scale_NG = _fit_scales(wanted_NQ, moment_QQ, codes_NQ - zero_NG[:, groups], scale_NG, layout)
    error_NQ = (codes_NQ - zero_NG[:, groups]) * scale_NG[:, groups] - wanted_NQ
    return codes_NQ, scale_NG, zero_NG, weight_NK[:, salient] - error_NQ @ answer_SQ.T


def _fit_scales(
    wanted_NQ: torch.Tensor, moment_QQ: torch.Tensor, steps_NQ: torch.Tensor, scale_NG: torch.Tensor, layout: LinearLayout
) -> torch.Tensor:
    """The scales (N, G), as they can be stored, that lose least with these codes less their zero points.

    For each row sum_h s_h (c_g M c_h) = c_g M w for all g, c_g the row's codes in group g. A scale stays where the solution would change it much.
    """
    owner_QG = torch.nn.functional.one_hot(layout.column_groups(wanted_NQ.device), layout.groups).to(wanted_NQ)
    known_NG = ((wanted_NQ @ moment_QQ) * steps_NQ) @ owner_QG
    products = [((steps_NQ[:, own].contiguous() @ moment_QQ[own]) * steps_NQ) @ owner_QG for own in layout.group_slices()]
    normal_NGG = torch.stack(products, 1)
    diagonal = normal_NGG.diagonal(dim1=-2, dim2=-1)
    diagonal += RIDGE * diagonal.mean(-1, keepdim=True) + torch.finfo(diagonal.dtype).tiny
    found_NG = torch.linalg.solve_ex(normal_NGG, known_NG[..., None])[0][..., 0]  # what has no solution is not finite
    fine = torch.isfinite(found_NG) & (found_NG > scale_NG / LARGEST) & (found_NG < scale_NG * LARGEST)
    return layout.code_step * (torch.where(fine, found_NG, scale_NG) / layout.code_step).half().to(scale_NG)


def _sweep(
    wanted_NQ: torch.Tensor, moment_QQ: torch.Tensor, codes_NQ: torch.Tensor, grid: tuple[torch.Tensor, torch.Tensor], top: int
) -> torch.Tensor:
    """Each code (N, Q) in turn where the loss is least.

    With the gradient G = E M of half the loss, channel k belongs at v_k - G_k / M_kk, and moving an earlier channel j by d moves
    that place by -d M_jk / M_kk. In a block of channels these moves are a lower triangular matrix, so that the places before
    any move times its inverse, and its inverse as the factor, make a block of the sweep what `round_columns` does for GPTQ.
    """
    scale_QN, zero_QN = (part.T.contiguous() for part in grid)
    codes_QN = codes_NQ.T.contiguous()
    value_QN = (codes_QN - zero_QN) * scale_QN
    gradient_QN = moment_QQ @ (value_QN - wanted_NQ.T)
    one_CC = torch.eye(BLOCK, dtype=torch.float64, device=moment_QQ.device)
    for start in range(0, len(codes_QN), BLOCK):
        part = slice(start, start + BLOCK)
        own_CC = moment_QQ[part, part].double()
        moves_CC = own_CC.tril() / own_CC.diagonal()[:, None]
        back_CC = torch.linalg.solve_triangular(moves_CC, one_CC[: len(moves_CC), : len(moves_CC)], upper=False, unitriangular=True).to(wanted_NQ)
        place_CN = moves_CC.to(wanted_NQ) @ value_QN[part] - gradient_QN[part] / own_CC.diagonal()[:, None].to(wanted_NQ)
        codes_QN[part] = round_columns((back_CC @ place_CN).contiguous(), back_CC.T.contiguous(), 0, scale_QN[part], zero_QN[part], top)
        moved_CN = (codes_QN[part] - zero_QN[part]) * scale_QN[part] - value_QN[part]
        gradient_QN[start + BLOCK :] += moment_QQ[start + BLOCK :, part] @ moved_CN
    return codes_QN.T
