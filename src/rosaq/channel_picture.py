"""The picture of a model card: how large the residual stream's channels are before and after the rotation."""

import importlib.util
import io

import torch


def channel_magnitudes(moment_DD: torch.Tensor, basis_DD: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Root mean square (D,) of each channel before and after a rotation, over that of the mean channel.

    Args:
        moment_DD: of the residual stream, as `basis.ResidualSum` has it.
        basis_DD: orthogonal, one direction a column.
    """
    moment, basis = moment_DD.double().cpu(), basis_DD.double().cpu()
    squares = (moment.diagonal(), (basis * (moment @ basis)).sum(0))
    before, after = ((square.clamp_min(0) / square.mean()).sqrt() for square in squares)
    return before, after


def channel_picture(moment_DD: torch.Tensor, basis_DD: torch.Tensor, salient: int) -> bytes | None:
    """The picture as PNG, the same bytes for the same numbers; None where matplotlib is not installed.

    Args:
        moment_DD: see `channel_magnitudes`.
        basis_DD: see there.
        salient: leading channels that stay precise.
    """
    if importlib.util.find_spec("matplotlib") is None:
        return None
    from matplotlib.figure import Figure  # noqa: PLC0415  (an optional dependency)

    figure = Figure(figsize=(7, 3), layout="constrained")
    axes = figure.subplots()
    for values, colour, label in zip(channel_magnitudes(moment_DD, basis_DD), ("#c0504d", "#3b6ea5"), ("before", "after rotation"), strict=True):
        axes.plot([float(f"{value:.6g}") for value in values.tolist()], color=colour, linewidth=0.8, label=label)
    if salient:
        axes.axvspan(-0.5, salient - 0.5, color="#3b6ea5", alpha=0.12, linewidth=0)
    axes.set(xlabel="channel", ylabel="root mean square", yscale="log")
    figure.legend(loc="outside upper right", ncols=2)
    picture = io.BytesIO()
    figure.savefig(picture, format="png", dpi=110, metadata={"Software": None})
    return picture.getvalue()
