"""Sums up each site's inputs over windows in several bases, channel by channel, block after block.

Norms are folded first, so the inputs of attn_in and mlp_in are x / rms(x), as calibration sees them. Shape letters:
T tokens, K inputs of a site, H key-value heads, E head size.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from rosaq.architecture import NORMS, SITE_NORM, Architecture
from rosaq.clock import Progress
from rosaq.distributed import Ranks
from rosaq.moments import Flow, check_finite, run_blocks, second_moment
from rosaq.rotation import principal_basis
from rosaq.source import Source
from rosaq.statistics import Statistics, compute_dtype, placed

OWN, NORMALISED, GLOBAL, LOCAL, HEADS = "own", "normalised", "global", "per-layer", "head-wise"


@dataclass(frozen=True)
class View:
    """A site's inputs in one basis.

    Attributes:
        magnitude: (K,) mean |x| of each channel.
        energy: (K,) mean x^2; the eigenvalues, where the basis is the site's own principal axes.
        fourth: (K,) mean x^4.
    """

    magnitude: torch.Tensor
    energy: torch.Tensor
    fourth: torch.Tensor


@dataclass(frozen=True)
class Observation:
    """One site of one block.

    Attributes:
        views: basis -> view. "own": what the model's linear layers see. "normalised": before the norm's weight.
            "global": in the principal axes of the whole residual stream. "per-layer": in this site's own principal
            axes. "head-wise": in those of each key-value head.
        moment: (K, K) mean x^T x of the normalised inputs, float32, on the CPU.
    """

    views: dict[str, View]
    moment: torch.Tensor


class _Sums:
    """Sums over batches of one site's inputs, in every basis."""

    def __init__(self, transforms: dict[str, torch.Tensor | None]) -> None:
        self.transforms, self.seen = transforms, 0
        self.sums: dict[str, list[torch.Tensor]] = {}
        self.second: torch.Tensor | None = None

    def add(self, x_TK: torch.Tensor) -> None:
        self.seen += x_TK.shape[0]
        second = second_moment(x_TK)
        self.second = second if self.second is None else self.second.add_(second)
        x_TK = x_TK.float()
        for name, transform in self.transforms.items():
            turned = _turned(x_TK, transform)
            square = turned.square()
            parts = [turned.abs().sum(0), square.sum(0), square.square().sum(0)]
            old = self.sums.get(name)
            self.sums[name] = [part.double() for part in parts] if old is None else [a + b for a, b in zip(old, parts, strict=True)]

    def share(self, ranks: Ranks, dtype: torch.dtype) -> None:
        assert ranks.count == 1, "one process looks at all windows"

    def finish(self, where: str) -> Observation:
        assert self.second is not None
        check_finite(self.second, where)
        views = {name: View(*((part / self.seen).cpu() for part in parts)) for name, parts in self.sums.items()}
        return Observation(views, (self.second / self.seen).cpu())


def _turned(x_TK: torch.Tensor, transform: torch.Tensor | None) -> torch.Tensor:
    """Inputs times a diagonal (K,), a basis (K, K), or one basis per query head (heads, E, E)."""
    if transform is None:
        return x_TK
    if transform.dim() == 1:
        return x_TK * transform
    if transform.dim() == 2:
        return x_TK @ transform
    return torch.einsum("the,hef->thf", x_TK.view(x_TK.shape[0], transform.shape[0], -1), transform).flatten(1)


@torch.inference_mode()
def observe(source: Source, statistics: Statistics, device: str, progress: Progress) -> Iterator[dict[str, Observation]]:
    """Observe each site of each block over the calibration windows; one block's observations are held at a time.

    Args:
        source: the model.
        statistics: its calibration, which the bases are made of.
        device: where the blocks run.
        progress: called as ("observing", blocks done, blocks).
    """
    a, shared = source.architecture, principal_basis(statistics.residual_moment().to(device))[0].float()

    def make(index: int, site: str, first: int) -> _Sums:
        norm = SITE_NORM.get(site)
        gain = None if norm is None else source.tensor(f"{a.block_prefix(index)}{NORMS[norm]}.weight").to(device).float()
        return _Sums(_transforms(site, statistics.inputs[index][site].moment, gain, shared, a))

    flow = placed(Flow(), source, statistics.windows, device, second_pass=True)
    for done, observed in run_blocks(source, statistics.windows, device, compute_dtype(source, device), make, flow):
        progress("observing", done, a.layers)
        yield observed
        del observed  # so that it is not held while the next block runs


def _transforms(
    site: str, moment: torch.Tensor | None, gain: torch.Tensor | None, shared: torch.Tensor, a: Architecture
) -> dict[str, torch.Tensor | None]:
    """The bases that a site is seen in."""
    if site in SITE_NORM:
        assert moment is not None
        own = principal_basis(moment.to(shared.device))[0].float()
        return {OWN: gain, NORMALISED: None, GLOBAL: shared, LOCAL: own}
    if site == "attn_out":
        assert moment is not None
        heads = principal_basis(moment.to(shared.device))[0].float()
        return {OWN: None, HEADS: heads.repeat_interleave(a.heads // a.kv_heads, 0)}
    return {OWN: None}
