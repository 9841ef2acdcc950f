"""What a view of a site's inputs says: which channels stand out, how much energy the leading ones have."""

from dataclasses import asdict, dataclass
from typing import Any

import torch

from rosaq.inspection.observation import View

LEAST = torch.finfo(torch.float64).tiny  # in the place of a sum of squares that is 0, so that nothing over nothing is 0


@dataclass(frozen=True)
class Outliers:
    """How far a site's inputs are from evenly spread; all 0 where they are zero throughout the text.

    Attributes:
        kurtosis: mean x^4 over (mean x^2)^2, all channels and tokens together; 3 for one Gaussian.
        max_over_median: largest mean |x| of a channel over the median one.
        top_energy: share of the energy (sum of mean x^2) in the K channels of most energy.
    """

    kurtosis: float
    max_over_median: float
    top_energy: float

    def to_dict(self) -> dict[str, Any]:
        """All fields, JSON-able."""
        return asdict(self)


def outliers(view: View, top: int, blocks: int = 1) -> Outliers:
    """Figures of one view.

    Args:
        view: of a site.
        top: channels counted as leading, K; of each block, where there are several.
        blocks: equal parts of the channels that each have their own leading ones, such as heads.
    """
    energy = view.energy.double()
    median = view.magnitude.median().clamp_min(torch.finfo(torch.float32).tiny)
    leading = energy.view(blocks, -1).sort(descending=True).values[:, :top]
    return Outliers(
        float(view.fourth.double().mean() / energy.mean().square().clamp_min(LEAST)),
        float(view.magnitude.max() / median),
        float(leading.sum() / energy.sum().clamp_min(LEAST)),
    )


@dataclass(frozen=True)
class TopChannel:
    """A channel of large magnitude (a row of ROSAQ's Table 8): its index, mean |x|, and mean x^2 (after PCA its eigenvalue)."""

    index: int
    magnitude: float
    energy: float


def top_channels(views: list[View], count: int) -> list[TopChannel]:
    """The channels of the largest mean |x|, averaged over sites in one basis, largest first."""
    magnitude = torch.stack([view.magnitude for view in views]).mean(0)
    energy = torch.stack([view.energy for view in views]).mean(0)
    order = magnitude.argsort(descending=True, stable=True)[:count]
    return [TopChannel(int(index), float(magnitude[index]), float(energy[index])) for index in order]


def log_spread(weight: torch.Tensor) -> float:
    """Standard deviation of the logarithms of a norm's weights: how far it pulls the channels apart.

    Where it is 1 or more, far more of them stand out than Mixed keeps; a rotation folds the norm into the layers first (docs/results.md).
    """
    return float(weight.double().abs().clamp_min(LEAST).log().std())
