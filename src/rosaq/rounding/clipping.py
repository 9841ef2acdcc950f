"""AWQ's search for clipped ranges (arXiv:2306.00978, appendix; `auto_clip` in its code): a grid finer than a group's extremes ask for.

The shares tried, the symmetric clamp and the criterion are those of AWQ's code: for each output and group the squared
error of the group's part of the output, w_g and its rounding against the inputs of the group. What differs: the inputs
come as second moments over all tokens instead of 512 sampled ones. Shape letters: N outputs, Q quantized channels,
G groups, C channels of a full group.
"""

from functools import lru_cache

import torch

from rosaq.layout import LinearLayout, code_step
from rosaq.rounding.grid import FP16_TINY, fit_grid, to_codes

SHARES = [1 - step / 20 for step in range(10)]  # of a group's largest |w|: 1, 0.95, ... 0.55
UNCLIPPED = ("q", "k")  # AWQ leaves them: their errors meet in a product, not in a sum
OUTPUTS = 2048  # rows that are searched at a time
TRIED = {"cpu": 1 << 20, "cuda": 1 << 24}  # weights, times shares, that are rounded at a time
SHRUNK = [1 - step / 25 for step in range(11)]  # of a group's whole range, where only squared errors are looked at: 1, 0.96, ... 0.6
FOUR_LEVELS = (0.96, 0.84, 0.72, 0.6, 0.48)  # the same for 2 bits, where the zero point counts more than a fine choice of the share
MOVES = (0.0, -0.5, -0.25, 0.25, 0.5)  # of the zero point among them, in steps


def group_moments(moment_QQ: torch.Tensor, layout: LinearLayout) -> torch.Tensor:
    """The diagonal blocks (G, C, C) of a second moment of the quantized channels; a shorter group is filled up with zeros."""
    blocks = moment_QQ.new_zeros(layout.groups, layout.group_size, layout.group_size)
    for group, own in enumerate(layout.group_slices()):
        length = own.stop - own.start
        blocks[group, :length, :length] = moment_QQ[own, own]
    return blocks


def fit_clipped_grid(weight_NGC: torch.Tensor, moment_GCC: torch.Tensor, bits: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Scale and zero point (N, G) of each group, of the share of its range that loses least of the output.

    Raises:
        ValueError: a range that no FP16 scale spans.
    """
    parts = [_search(rows, moment_GCC.to(rows), bits) for rows in weight_NGC.split(OUTPUTS)]
    scales, zeros = zip(*parts, strict=True)
    return torch.cat(scales), torch.cat(zeros)


def _search(weight_NGC: torch.Tensor, moment_GCC: torch.Tensor, bits: int) -> tuple[torch.Tensor, torch.Tensor]:
    largest = weight_NGC.abs().amax(-1, keepdim=True)
    best, best_loss = fit_grid(weight_NGC, bits), torch.full_like(largest[..., 0], torch.inf)
    for share in SHARES:
        scale, zero = fit_grid(weight_NGC.clamp(-share * largest, share * largest), bits)
        codes = to_codes(weight_NGC, scale, zero, bits)
        error_GNC = ((codes - zero[..., None]) * scale[..., None] - weight_NGC).transpose(0, 1)
        loss = ((error_GNC @ moment_GCC) * error_GNC).sum(-1).T
        better = loss < best_loss
        best = torch.where(better, scale, best[0]), torch.where(better, zero, best[1])
        best_loss = torch.where(better, loss, best_loss)
    return best


def shrunk_grids(bits: int) -> list[tuple[float, float]]:
    """The grids that `fit_shrunk_grid` tries: shares of the whole range, with what is added to its zero point."""
    return [(share, moved) for moved in MOVES for share in FOUR_LEVELS] if bits == 2 else [(share, 0.0) for share in SHRUNK]


@lru_cache
def _tried(bits: int, device: torch.device, dtype: torch.dtype) -> torch.Tensor:
    """`shrunk_grids` on a device, copied there once."""
    return torch.tensor(shrunk_grids(bits), device=device, dtype=dtype)


def fit_shrunk_grid(weight_NGC: torch.Tensor, counts_GC: torch.Tensor, bits: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Scale and zero point (N, G) of each group, of the share of its range whose rounding has the least squared error.

    The zero point is that of the whole range, at 2 bits or up to half a step beside it. A channel's squared errors are multiplied by what they
    count (G, C), so that a group's errors are taken as independent; GPTQ's conditional variances are such counts.

    Raises:
        ValueError: a range that no FP16 scale spans.
    """
    whole, zero = fit_grid(weight_NGC, bits)
    step = code_step(bits)
    tried = _tried(bits, whole.device, whole.dtype)
    shares, moves = tried[:, :1, None], tried[:, 1:, None]
    rows = max(1, TRIED[whole.device.type] // (len(tried) * weight_NGC[0].numel()))
    best = []
    for weight, scale, code in zip(weight_NGC.split(rows), whole.split(rows), zero.split(rows), strict=True):
        scales = step * (shares / step * scale).half().to(whole).clamp_min(FP16_TINY)  # all at once: on a GPU the launches are what takes time
        codes = (code + moves).clamp_(0, (1 << bits) - 1)
        error = (to_codes(weight, scales, codes, bits) - codes[..., None]).mul_(scales[..., None]).sub_(weight)
        chosen = torch.einsum("pngc,gc->png", error.square_(), counts_GC.to(whole)).argmin(0, keepdim=True)
        best.append((scales.gather(0, chosen)[0], codes.gather(0, chosen)[0]))
    scales, zeros = zip(*best, strict=True)
    return torch.cat(scales), torch.cat(zeros)
