"""Runs the model over the calibration windows and keeps what each site's inputs look like.

Blocks are loaded one at a time with their norms folded, so the residual sites see x / rms(x) (ROSAQ Eq. 1); the
inputs under the norm weights follow from these (x diag(g)). Shape letters: T tokens, D hidden, K inputs of a site,
H key-value heads, E head size, P sampled tokens.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch

from rosaq.activations import Activations
from rosaq.architecture import LINEARS, SITES, Architecture
from rosaq.clock import Clock, Progress
from rosaq.distributed import ALONE, Ranks
from rosaq.rotation import Block, fold_norms
from rosaq.skeleton import BlockRunner, batches
from rosaq.source import Source

SAMPLED_TOKENS = 1024  # per site, spread evenly over the windows, for searches that need inputs rather than moments
BATCH_TOKENS = {"cpu": 2048, "cuda": 16384}


@dataclass(frozen=True)
class Flow:
    """How a pass over the windows is run.

    Attributes:
        start: first decoder block whose sums are wanted; the blocks before it only run.
        ranks: that share the windows; sums are added up over them.
        place: where the activations are kept, "device", "host" or "disk".
        folder: for "disk".
        clock: takes the times of "reading" (waiting for a block's weights) and of whoever iterates.
        sink_weight: how many times each window's first token counts in whole second moments; see `Recipe`.
        weights: how much each token of all windows (S, T) counts in them, of each block by site; None: one each.
    """

    start: int = 0
    ranks: Ranks = ALONE
    place: str = "host"
    folder: Path | None = None
    clock: Clock = field(default_factory=Clock)
    sink_weight: int = 1
    weights: list[dict[str, torch.Tensor]] | None = None


@dataclass
class SiteInputs:
    """What is kept of one site's inputs.

    Attributes:
        magnitude: (K,) mean |x| over tokens, float32.
        moment: mean x^T x over tokens, summed in float64 and kept in float32: (K, K) for residual sites, (H, E, E)
            for attn_out (pooled over the query heads of each key-value head), None for mlp_out.
        sample: (P, K) inputs of some tokens, in the type that they were computed in, for mlp_out; None elsewhere.
    """

    magnitude: torch.Tensor
    moment: torch.Tensor | None = None
    sample: torch.Tensor | None = None

    def to(self, device: str) -> "SiteInputs":
        """The same on another device."""
        moved = (None if tensor is None else tensor.to(device) for tensor in (self.moment, self.sample))
        return SiteInputs(self.magnitude.to(device), *moved)


BlockInputs = dict[str, SiteInputs]


class _SiteSums:
    """Sums over batches of one site's inputs.

    Args:
        site: which.
        a: the model's sizes.
        windows: (S, T) of all ranks.
        first: number of this rank's first window.
        device: where the sums are.
    """

    def __init__(self, site: str, a: Architecture, windows: torch.Size, first: int, device: str) -> None:
        self.site, self.a, self.tokens, self.seen = site, a, windows.numel(), first * windows[1]
        width, self.stride = a.width(site), max(1, windows.numel() // SAMPLED_TOKENS)
        self.absolute = torch.zeros(width, dtype=torch.float64, device=device)
        self.second: torch.Tensor | None = None
        self.rows: list[torch.Tensor] = []
        self.first_row = -(-self.seen // self.stride)
        if site != "mlp_out":
            shape = (a.kv_heads, a.head_size, a.head_size) if site == "attn_out" else (width, width)
            self.second = torch.zeros(shape, dtype=torch.float64, device=device)

    def add(self, x_TK: torch.Tensor) -> None:
        self.absolute += x_TK.abs().sum(0, dtype=torch.float64)
        if self.second is None:
            self.rows.append(x_TK[-self.seen % self.stride :: self.stride].clone())
        else:
            self.second += self._second(x_TK)
        self.seen += x_TK.shape[0]

    def _second(self, x_TK: torch.Tensor) -> torch.Tensor:
        if self.site != "attn_out":
            return second_moment(x_TK)
        x_HTE = x_TK.view(x_TK.shape[0], self.a.kv_heads, -1, self.a.head_size).permute(1, 0, 2, 3).flatten(1, 2)
        return second_moment(x_HTE)

    def share(self, ranks: Ranks, dtype: torch.dtype) -> None:
        """Add up over the ranks; every one of them then has the same sums, and the sample in the order of the windows."""
        ranks.add(self.absolute)
        if self.second is not None:
            ranks.add(self.second)
            return
        count = -(-self.tokens // self.stride)
        sample = torch.zeros(count, self.absolute.numel(), dtype=dtype, device=self.absolute.device)
        if self.rows:
            rows = torch.cat(self.rows)
            sample[self.first_row : self.first_row + len(rows)] = rows
        self.rows = [ranks.add(sample)]

    def finish(self, where: str) -> SiteInputs:
        check_finite(self.absolute, where)
        magnitude = (self.absolute / self.tokens).float()
        if self.second is None:
            return SiteInputs(magnitude, None, torch.cat(self.rows))
        pooled = self.a.heads // self.a.kv_heads if self.site == "attn_out" else 1
        moment = (self.second / (self.tokens * pooled)).float()
        check_finite(moment, where)
        return SiteInputs(magnitude, moment)


class _MomentSum:
    """Sum over batches of one site's whole second moment, each token counted by its weight, of this rank's windows."""

    def __init__(self, site: str, a: Architecture, windows: torch.Size, device: str, sink_weight: int, weights: torch.Tensor | None) -> None:
        self.tokens, self.window, self.again = windows.numel(), windows[1], sink_weight - 1
        self.roots, self.seen = None if weights is None else weights.flatten().sqrt().to(device), 0
        self.second = torch.zeros(a.width(site), a.width(site), dtype=torch.float64, device=device)

    def add(self, x_TK: torch.Tensor) -> None:
        if self.roots is not None:
            x_TK = (x_TK * self.roots[self.seen : self.seen + len(x_TK), None]).to(x_TK.dtype)
            self.seen += len(x_TK)
        self.second += second_moment(x_TK)
        if self.again:  # a batch is whole windows
            self.second += self.again * second_moment(x_TK[:: self.window].contiguous())

    def share(self, ranks: Ranks, dtype: torch.dtype) -> None:
        ranks.add(self.second)

    def finish(self, where: str) -> torch.Tensor:
        check_finite(self.second, where)
        return (self.second / self.tokens).float()


def second_moment(x: torch.Tensor) -> torch.Tensor:
    """x^T x of (..., T, K), float32.

    Half-precision inputs on a GPU are multiplied as they are: their products are exact in float32, where they are added
    up, so nothing is lost against turning them into float32 first.
    """
    if x.is_cuda and x.dtype in (torch.bfloat16, torch.float16):
        product = torch.mm if x.dim() == 2 else torch.bmm
        return product(x.transpose(-1, -2), x, out_dtype=torch.float32)
    x = x.float()
    return x.transpose(-1, -2) @ x


@torch.inference_mode()
def collect(
    source: Source, windows: torch.Tensor, device: str, dtype: torch.dtype, progress: Progress, flow: Flow | None = None
) -> Iterator[BlockInputs]:
    """Inputs of the four sites, on the device, block after block.

    Device memory: one block, its sums, one batch and, where the flow keeps them there, the activations of all windows,
    S x T x hidden.

    Args:
        source: the model.
        windows: token ids (S, T), of all ranks.
        device: where the blocks run.
        dtype: type the blocks run in; sums are float64.
        progress: called after each block.
        flow: how the pass is run.

    Raises:
        ValueError: NaN or Inf in activations, naming block and site.
    """

    def make(_: int, site: str, first: int) -> _SiteSums:
        return _SiteSums(site, source.architecture, windows.shape, first, device)

    for done, inputs in run_blocks(source, windows, device, dtype, make, flow or Flow()):
        progress("activations", done, source.architecture.layers)
        if inputs is not None:
            yield inputs
        del inputs  # so that they are not held while the next block runs


@torch.inference_mode()
def collect_moments(
    source: Source, windows: torch.Tensor, device: str, dtype: torch.dtype, flow: Flow | None = None
) -> Iterator[dict[str, torch.Tensor]]:
    """Whole second moments (K, K) of the four sites' inputs, float32 on the device, block after block.

    The same pass as `collect`, for rounding that looks at all pairs of channels; only one block's are held at a time.
    """
    flow = flow or Flow()

    def make(index: int, site: str, first: int) -> _MomentSum:
        weights = None if flow.weights is None else flow.weights[index][site][first:]
        return _MomentSum(site, source.architecture, windows.shape, device, flow.sink_weight, weights)

    for _, moments in run_blocks(source, windows, device, dtype, make, flow):
        if moments is not None:
            yield moments
        del moments  # so that they are not held while the next block runs


class Sums(Protocol):
    """Sums over batches of one site's inputs."""

    def add(self, x_TK: torch.Tensor) -> None:
        """Take the inputs of one batch in."""

    def share(self, ranks: Ranks, dtype: torch.dtype) -> None:
        """Add up over the ranks, of whose blocks this is the type."""

    def finish(self, where: str) -> Any:
        """What they come to; `where` names block and layer.

        Raises:
            ValueError: NaN or Inf among the inputs.
        """


def run_blocks(
    source: Source, windows: torch.Tensor, device: str, dtype: torch.dtype, make: Callable[[int, str, int], Sums], flow: Flow
) -> Iterator[tuple[int, Any]]:
    """Run all blocks over the windows, one in memory at a time, their norms folded.

    Args:
        source: the model.
        windows: token ids (S, T), of all ranks.
        device: where the blocks run.
        dtype: type they run in.
        make: the sums of (block, site, this rank's first window), made before the block runs.
        flow: how the pass is run.

    Yields:
        Blocks done, and what the block's sums come to by site, or None before `flow.start`.
    """
    a, clock = source.architecture, flow.clock
    tokens = BATCH_TOKENS[torch.device(device).type]
    mine = own_windows(windows, tokens, flow.ranks)
    part = windows[mine]
    runner = BlockRunner(source.config, windows.shape[1], dtype, device)
    with Activations((part.shape[0], windows.shape[1], a.hidden), dtype, device, flow.place, flow.folder) as hidden:
        with clock("embedding"):
            embed(source, part, hidden, (device, dtype), tokens)
        blocks = source.blocks(range(a.layers), device)
        for index in range(a.layers):
            with clock("reading"):
                tensors = next(blocks)
            block = runner.load(index, folded(tensors, dtype))
            del tensors
            wanted = index >= flow.start
            sums = {site: make(index, site, mine.start) for site in SITES} if wanted else {}
            hooks = [_hook(block, site, kept) for site, kept in sums.items()]
            for rows in batches(part, tokens):
                states = runner.run(index, hidden.read(rows))
                if index + 1 < a.layers:
                    hidden.write(rows, states)
            for hook in hooks:
                hook.remove()
            runner.release(index)
            yield index + 1, _finish(sums, index, flow.ranks, dtype) if wanted else None


def _finish(sums: dict[str, Sums], index: int, ranks: Ranks, dtype: torch.dtype) -> dict[str, Any]:
    """What the sums come to, by site; each sum's memory is given back."""
    finished = {}
    for site in SITES:
        kept = sums.pop(site)
        kept.share(ranks, dtype)
        finished[site] = kept.finish(f"decoder block {index}, inputs of {LINEARS[SITES[site][0]]}")
    return finished


def own_windows(windows: torch.Tensor, tokens: int, ranks: Ranks) -> slice:
    """The windows of this rank: whole batches, so that each batch is computed as one rank alone would compute it."""
    groups = list(batches(windows, tokens))
    share = ranks.share(len(groups))
    return slice(groups[share.start].start, groups[share.stop - 1].stop) if share else slice(0, 0)


def folded(tensors: Block, dtype: torch.dtype) -> Block:
    """A block with its norms folded, in the type that it runs in; products are float32."""
    exact = fold_norms({name: tensor.float() for name, tensor in tensors.items()})
    return {name: tensor.to(dtype) for name, tensor in exact.items()}


def embed(source: Source, windows: torch.Tensor, hidden: Activations, form: tuple[str, torch.dtype], tokens: int) -> None:
    """Put the embeddings of windows (S, T) into the hidden states, by batches of so many tokens; the form is device and type."""
    table = source.embedding().to(form[0])
    for rows in batches(windows, tokens):
        hidden.write(rows, torch.nn.functional.embedding(windows[rows].to(form[0]), table).to(form[1]))


def _hook(block: torch.nn.Module, site: str, sums: Sums) -> torch.utils.hooks.RemovableHandle:
    linear = block.get_submodule(LINEARS[SITES[site][0]])
    return linear.register_forward_pre_hook(lambda _, arguments: sums.add(arguments[0].flatten(0, -2)))


def check_finite(sums: torch.Tensor, where: str) -> None:
    """Refuse activations that overflowed, by their sums.

    Raises:
        ValueError: NaN or Inf; names the place.
    """
    if not torch.isfinite(sums).all():
        raise ValueError(f"{where}: the calibration activations hold NaN or Inf")
