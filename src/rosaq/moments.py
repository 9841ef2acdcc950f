"""Runs the model over the calibration windows and keeps what each site's inputs look like.

Blocks are loaded one at a time with their norms folded, so the residual sites see x / rms(x) (ROSAQ Eq. 1); the
inputs under the norm weights follow from these (x diag(g)). Shape letters: T tokens, D hidden, K inputs of a site,
H key-value heads, E head size, P sampled tokens.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TypeVar

import torch

from rosaq.architecture import LINEARS, SITES, Architecture
from rosaq.clock import Progress
from rosaq.rotation import fold_norms
from rosaq.skeleton import BlockRunner, batches
from rosaq.source import Source

SAMPLED_TOKENS = 1024  # per site, spread evenly over the windows, for searches that need inputs rather than moments
BATCH_TOKENS = {"cpu": 2048, "cuda": 16384}


@dataclass
class SiteInputs:
    """What is kept of one site's inputs, on the CPU.

    Attributes:
        magnitude: (K,) mean |x| over tokens, float32.
        moment: mean x^T x over tokens, summed in float64 and kept in float32: (K, K) for residual sites, (H, E, E)
            for attn_out (pooled over the query heads of each key-value head), None for mlp_out.
        sample: (P, K) inputs of some tokens, float32, for mlp_out; None elsewhere.
    """

    magnitude: torch.Tensor
    moment: torch.Tensor | None = None
    sample: torch.Tensor | None = None


BlockInputs = dict[str, SiteInputs]


class _SiteSums:
    """Sums over batches of one site's inputs."""

    def __init__(self, site: str, architecture: Architecture, tokens: int) -> None:
        self.site, self.a, self.tokens, self.seen = site, architecture, tokens, 0
        self.absolute: torch.Tensor | None = None
        self.second: torch.Tensor | None = None
        self.rows: list[torch.Tensor] = []

    def add(self, x_TK: torch.Tensor, where: str) -> None:
        check_finite(x_TK, where)
        x_TK = x_TK.float()
        absolute = x_TK.abs().sum(0, dtype=torch.float64)
        self.absolute = absolute if self.absolute is None else self.absolute + absolute
        if self.site == "mlp_out":
            stride = max(1, self.tokens // SAMPLED_TOKENS)
            first = -self.seen % stride
            self.rows.append(x_TK[first::stride].cpu())
        else:
            second = self._second(x_TK).double()
            self.second = second if self.second is None else self.second + second
        self.seen += x_TK.shape[0]

    def _second(self, x_TK: torch.Tensor) -> torch.Tensor:
        if self.site != "attn_out":
            return x_TK.T @ x_TK
        x_HTE = x_TK.view(x_TK.shape[0], self.a.kv_heads, -1, self.a.head_size).permute(1, 0, 2, 3).flatten(1, 2)
        return x_HTE.transpose(1, 2) @ x_HTE

    def inputs(self) -> SiteInputs:
        assert self.absolute is not None
        moment = None if self.second is None else self._pooled().float().cpu()
        return SiteInputs((self.absolute / self.seen).float().cpu(), moment, torch.cat(self.rows) if self.rows else None)

    def _pooled(self) -> torch.Tensor:
        assert self.second is not None
        pooled = self.a.heads // self.a.kv_heads if self.site == "attn_out" else 1
        return self.second / (self.seen * pooled)


@torch.inference_mode()
def collect(source: Source, windows: torch.Tensor, device: str, dtype: torch.dtype, progress: Progress) -> Iterator[BlockInputs]:
    """Inputs of the four sites, block after block.

    Device memory: one block, its sums and one batch. Host memory: the activations of all windows, S x T x hidden.

    Args:
        source: the model.
        windows: token ids (S, T).
        device: where the blocks run.
        dtype: type the blocks run in; sums are float64.
        progress: called after each block.

    Raises:
        ValueError: NaN or Inf in activations, naming block and site.
    """
    for done, sums in _run(source, windows, device, dtype, lambda site: _SiteSums(site, source.architecture, windows.numel())):
        progress("activations", done, source.architecture.layers)
        yield {site: kept.inputs() for site, kept in sums.items()}


@torch.inference_mode()
def collect_moments(source: Source, windows: torch.Tensor, device: str, dtype: torch.dtype) -> Iterator[dict[str, torch.Tensor]]:
    """Whole second moments (K, K) of the four sites' inputs, float32 on the device, block after block.

    The same pass as `collect`, for rounding that looks at all pairs of channels; only one block's are held at a time.
    """
    for _, sums in _run(source, windows, device, dtype, lambda site: _MomentSum()):
        yield {site: kept.moment() for site, kept in sums.items()}


class _MomentSum:
    """Sum over batches of one site's whole second moment."""

    def __init__(self) -> None:
        self.seen = 0
        self.second: torch.Tensor | None = None

    def add(self, x_TK: torch.Tensor, where: str) -> None:
        check_finite(x_TK, where)
        x_TK = x_TK.float()
        second = x_TK.T @ x_TK
        self.second = second if self.second is None else self.second.add_(second)
        self.seen += x_TK.shape[0]

    def moment(self) -> torch.Tensor:
        assert self.second is not None
        return self.second / self.seen


Sums = TypeVar("Sums", _SiteSums, _MomentSum)


def _run(
    source: Source, windows: torch.Tensor, device: str, dtype: torch.dtype, make: Callable[[str], Sums]
) -> Iterator[tuple[int, dict[str, Sums]]]:
    """Run all blocks over the windows; yields (blocks done, sums of the block's sites)."""
    a = source.architecture
    hidden = torch.nn.functional.embedding(windows, source.embedding()).to(dtype)
    runner = BlockRunner(source.config, windows.shape[1], dtype, device)
    for index in range(a.layers):
        block = runner.load(index, fold_norms(source.block(index)))
        sums = {site: make(site) for site in SITES}
        hooks = [_hook(block, site, sums[site], index) for site in SITES]
        for rows in batches(windows, BATCH_TOKENS[torch.device(device).type]):
            hidden[rows] = runner.run(index, hidden[rows].to(device)).to(hidden.device)
        for hook in hooks:
            hook.remove()
        runner.release(index)
        yield index + 1, sums


def _hook(block: torch.nn.Module, site: str, sums: _SiteSums | _MomentSum, index: int) -> torch.utils.hooks.RemovableHandle:
    where = f"decoder block {index}, inputs of {LINEARS[SITES[site][0]]}"
    linear = block.get_submodule(LINEARS[SITES[site][0]])
    return linear.register_forward_pre_hook(lambda _, arguments: sums.add(arguments[0].flatten(0, -2), where))


def check_finite(x_TK: torch.Tensor, where: str) -> None:
    """Refuse activations that overflowed.

    Raises:
        ValueError: NaN or Inf; names the place.
    """
    if not torch.isfinite(x_TK).all():
        raise ValueError(f"{where}: the calibration activations hold NaN or Inf")
