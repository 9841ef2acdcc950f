"""Runs the whole model over windows and sums up each site's inputs in several bases, channel by channel.

Norms are folded first, so the inputs of attn_in and mlp_in are x / rms(x), as calibration sees them. Shape letters:
T tokens, K inputs of a site, H key-value heads, E head size.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from rosaq.architecture import LINEARS, NORMS, SITE_NORM, SITES, Architecture
from rosaq.clock import Progress
from rosaq.rotation import principal_basis
from rosaq.skeleton import full_model
from rosaq.source import Source
from rosaq.statistics import Statistics, compute_dtype

OWN, NORMALISED, GLOBAL, LOCAL, HEADS = "own", "normalised", "global", "per-layer", "head-wise"
BATCH = {"cpu": 1, "cuda": 8}  # windows at a time


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
        x_TK = x_TK.float()
        self.seen += x_TK.shape[0]
        second = x_TK.T @ x_TK
        self.second = second if self.second is None else self.second.add_(second)
        for name, transform in self.transforms.items():
            turned = _turned(x_TK, transform)
            square = turned.square()
            parts = [turned.abs().sum(0), square.sum(0), square.square().sum(0)]
            old = self.sums.get(name)
            self.sums[name] = [part.double() for part in parts] if old is None else [a + b for a, b in zip(old, parts, strict=True)]

    def result(self) -> Observation:
        assert self.second is not None
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
def observe(source: Source, statistics: Statistics, device: str, progress: Progress) -> list[dict[str, Observation]]:
    """Observe each site of each block over the calibration windows; the whole model is in memory.

    Args:
        source: the model.
        statistics: its calibration, which the bases are made of.
        device: where the model runs.
        progress: called as ("observing", windows done, windows).
    """
    model = full_model(source, compute_dtype(source, device), device)
    gains = [_fold(layer) for layer in model.model.layers]
    shared = principal_basis(statistics.residual_moment().to(device))[0].float()
    sums = [
        {site: _Sums(_transforms(site, statistics.inputs[index][site].moment, gains[index].get(site), shared, source.architecture)) for site in SITES}
        for index in range(source.architecture.layers)
    ]
    with _hooks(model, sums):
        windows, step = statistics.windows, BATCH[torch.device(device).type]
        for start in range(0, windows.shape[0], step):
            model.model(windows[start : start + step].to(device), use_cache=False)
            progress("observing", min(start + step, windows.shape[0]), windows.shape[0])
    return [{site: kept.result() for site, kept in block.items()} for block in sums]


def _fold(layer: Any) -> dict[str, torch.Tensor]:
    """Move the norms' weights into the linear layers; returns them by site."""
    gains = {}
    for site, norm in SITE_NORM.items():
        weight = layer.get_submodule(NORMS[norm]).weight
        gains[site] = weight.detach().clone().float()
        for role in SITES[site]:
            layer.get_submodule(LINEARS[role]).weight.mul_(weight)
        weight.fill_(1)
    return gains


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


@contextmanager
def _hooks(model: Any, sums: list[dict[str, _Sums]]) -> Iterator[None]:
    def keep(sum_: _Sums) -> Any:
        return lambda _, arguments: sum_.add(arguments[0].flatten(0, -2))

    handles = []
    for layer, block in zip(model.model.layers, sums, strict=True):
        for site, kept in block.items():
            handles.append(layer.get_submodule(LINEARS[SITES[site][0]]).register_forward_pre_hook(keep(kept)))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
