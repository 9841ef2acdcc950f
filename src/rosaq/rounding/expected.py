"""What rounding is expected to do to a layer's outputs, without rounding: for choosing among forms of a layer.

A code is off by less than half a step, and by any such amount alike: a weight's error has the variance scale^2 / 12, and
those of different weights are independent. Rounded to nearest, the outputs' squared error tr(dW M dW^T) is the sum of
these times the diagonal of M. With GPTQ's feedback (arXiv:2210.17323) an error counts by what the channels still to come
cannot make up for: the variance of its channel given theirs, d_j = 1 / U_jj^2 with U the Cholesky factor that GPTQ uses. What it
rounds then are weights that carry the errors of others, and are larger for it by about as much as errors are beside weights: a
tenth at 2 bits.
Shape letters: N outputs, K inputs, G groups.
"""

from dataclasses import dataclass

import torch

from rosaq.layout import LinearLayout
from rosaq.rounding.clipping import fit_shrunk_grid
from rosaq.rounding.gptq import conditional_variances
from rosaq.rounding.grid import fit_grid, grouped, to_codes


@dataclass(frozen=True)
class Split:
    """A weight with so many of its channels salient, for all forms that differ in nothing but bits and groups.

    Attributes:
        channels: salient ones, of each block.
        weight_NQ: the quantized channels.
        counts_Q: what an error of each one's weights counts, float64.
        salient: expected loss of the salient channels, float64.
    """

    channels: int
    weight_NQ: torch.Tensor
    counts_Q: torch.Tensor
    salient: torch.Tensor


def split(weight_NK: torch.Tensor, layout: LinearLayout, moment_KK: torch.Tensor, feedback: bool) -> Split:
    """The parts of a weight in the order of the stored channels; salient INT8 channels, which nothing makes up for, count by M's diagonal.

    Args:
        weight_NK: the weight.
        layout: a form with that many salient channels.
        moment_KK: second moment M of the inputs.
        feedback: rounding is GPTQ's.
    """
    quantized, salient = layout.quantized_columns(moment_KK.device), layout.salient_columns(moment_KK.device)
    lost = torch.zeros((), dtype=torch.float64, device=moment_KK.device)
    if layout.salient and layout.salient_bits == 8:
        step_N = weight_NK[:, salient].abs().amax(1).double() / 127
        lost = step_N.square().sum() / 12 * moment_KK.diagonal()[salient].double().sum()
    return Split(layout.salient, weight_NK[:, quantized], channel_weights(moment_KK, layout, feedback)[quantized], lost)


def channel_weights(moment_KK: torch.Tensor, layout: LinearLayout, feedback: bool) -> torch.Tensor:
    """What an error of each input channel's weights (K,) counts in this form, float64.

    With feedback the salient channels come last, as in rounding: which ones they are changes what is left for all others to make up for.
    """
    if not feedback:
        return moment_KK.diagonal().double()
    device = moment_KK.device
    order_K = torch.cat([layout.quantized_columns(device), layout.salient_columns(device)])
    weights_K = torch.empty(layout.in_features, dtype=torch.float64, device=device)
    weights_K[order_K] = conditional_variances(moment_KK[order_K][:, order_K])
    return weights_K


def expected_loss(parts: Split, layout: LinearLayout, searched: bool = False, feedback: bool = False) -> torch.Tensor:
    """Expected tr(dW M dW^T) of a weight stored in a form, float64 on its device.

    Args:
        parts: of the weight, for that form's salient channels.
        layout: the form.
        searched: ranges are searched by squared error; then clipped weights are off by more than half a step, so that the errors
            themselves are taken.
        feedback: rounding is GPTQ's.
    """
    weight_NGC = grouped(parts.weight_NQ, layout)
    if searched:
        counts_GC = grouped(parts.counts_Q[None], layout)[0]
        scale_NG, zero_NG = fit_shrunk_grid(weight_NGC, counts_GC, layout.bits)
        error_NGC = (to_codes(weight_NGC, scale_NG, zero_NG, layout.bits) - zero_NG[..., None]) * scale_NG[..., None] - weight_NGC
        square_GC = error_NGC.square().sum(0, dtype=torch.float64)
        total, error = (square_GC * counts_GC).sum(), square_GC.sum()
    else:
        scale_NG, _ = fit_grid(weight_NGC, layout.bits)
        variance_Q = (scale_NG.double().square().sum(0) / 12)[layout.column_groups(scale_NG.device)]
        total, error = (variance_Q * parts.counts_Q).sum(), variance_Q.sum()
    if feedback:
        total = total * (1 + error / weight_NGC.square().sum(dtype=torch.float64).clamp_min(torch.finfo(torch.float64).tiny))
    return total + parts.salient
