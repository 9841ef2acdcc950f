"""GPTQ's inner loop: some channels rounded one after another, each one's error made up for by those still to come.

On a GPU with Triton it is one launch for all of them; elsewhere a few tensor operations a channel. Both are the same
operations in the same order; a compiler that fuses a product and a sum can change the last bit of an error, and so, seldom, a code. Shape
letters: J channels in the order of rounding, C of them that are rounded, N outputs.
"""

import importlib.util
from contextlib import nullcontext

import torch

TILE_N = 32  # outputs of one program: one warp, each of whose threads holds all C weights of its output
MAX_CHANNELS = 256  # that a thread has registers for


def round_columns(
    weight_JN: torch.Tensor, factor_JJ: torch.Tensor, start: int, scale_CN: torch.Tensor, zero_CN: torch.Tensor, top: int
) -> torch.Tensor:
    """Round C channels from `start` on and hand their errors to all that follow, in place.

    Args:
        weight_JN: float32 or float64, contiguous; what `start` to `start + C` hold afterwards is not defined.
        factor_JJ: upper Cholesky factor of the inverse second moment.
        start: the first channel to round.
        scale_CN: scale of each.
        zero_CN: zero point of each.
        top: the largest code.

    Returns:
        The codes (C, N), in the type of the weight.
    """
    stop = start + len(scale_CN)
    rounded = _launch if fits_kernel(weight_JN, len(scale_CN)) else _loop
    codes_CN, errors_CN = rounded(weight_JN, factor_JJ, start, scale_CN, zero_CN, top)
    weight_JN[stop:] -= factor_JJ[start:stop, stop:].T @ errors_CN
    return codes_CN


def fits_kernel(weight_JN: torch.Tensor, channels: int) -> bool:
    """Whether the Triton kernel takes them: float32 on a GPU, at most `MAX_CHANNELS` at a time, and Triton installed."""
    return weight_JN.is_cuda and weight_JN.dtype == torch.float32 and channels <= MAX_CHANNELS and importlib.util.find_spec("triton") is not None


def _loop(
    weight_JN: torch.Tensor, factor_JJ: torch.Tensor, start: int, scale_CN: torch.Tensor, zero_CN: torch.Tensor, top: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes and errors (C, N)."""
    stop = start + len(scale_CN)
    errors_CN, codes_CN = torch.empty_like(weight_JN[start:stop]), torch.empty_like(weight_JN[start:stop])
    for column in range(start, stop):
        exact_N, scale_N, zero_N = weight_JN[column], scale_CN[column - start], zero_CN[column - start]
        code_N = torch.round(exact_N / scale_N + zero_N).clamp_(0, top)
        error_N = (exact_N - (code_N - zero_N) * scale_N).div_(factor_JJ[column, column])
        weight_JN[column + 1 : stop].addr_(factor_JJ[column, column + 1 : stop], error_N, alpha=-1)
        errors_CN[column - start], codes_CN[column - start] = error_N, code_N
    return codes_CN, errors_CN


def _launch(
    weight_JN: torch.Tensor, factor_JJ: torch.Tensor, start: int, scale_CN: torch.Tensor, zero_CN: torch.Tensor, top: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """The same by the Triton kernel."""
    import triton  # noqa: PLC0415

    from rosaq.rounding.columns_kernel import round_tile  # noqa: PLC0415

    channels, n = scale_CN.shape
    factor_CC = factor_JJ[start : start + channels, start : start + channels].contiguous()
    assert weight_JN.is_contiguous() and scale_CN.stride(1) == zero_CN.stride(1) == 1
    errors_CN, codes_CN = torch.empty_like(weight_JN[:channels]), torch.empty_like(weight_JN[:channels])
    with torch.cuda.device(weight_JN.device) if weight_JN.is_cuda else nullcontext():  # Triton launches on the current GPU
        round_tile[triton.cdiv(n, TILE_N),](
            weight_JN[start:], factor_CC, scale_CN, zero_CN, codes_CN, errors_CN, n, scale_CN.stride(0), zero_CN.stride(0), float(top),
            CHANNELS=channels, PADDED=triton.next_power_of_2(channels), TILE_N=TILE_N, num_warps=1,
        )  # fmt: skip
    return codes_CN, errors_CN
