"""How fast this machine is at what quantizing consists of, measured in a few seconds, without the model's weights."""

import hashlib
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from rosaq.architecture import LINEARS, SITES, Architecture
from rosaq.layout import LinearLayout
from rosaq.recipe import Recipe
from rosaq.rounding.grid import round_to_nearest
from rosaq.rounding.linear import quantize_linear
from rosaq.source import Source

SECONDS = 0.2  # of each measurement, at least
TOKENS = {"cpu": 2048, "cuda": 16384}  # rows of the products that are timed: a batch of calibration
OUTPUTS = {"cpu": 512, "cuda": 8192}  # columns of them at most
WEIGHTS = {"cpu": 1 << 19, "cuda": 1 << 24}  # numbers that are rounded at a time
DISK = 1e9  # bytes per second that a disk is taken to give and to take where there is nothing to measure


@dataclass(frozen=True)
class Rates:
    """What one device does per second.

    Attributes:
        product: floating-point operations of matrix products, in the type that decoder blocks run in.
        exact: the same in float32, in which weights are rotated and rounded.
        fitted: weights rounded to nearest, as searches do.
        packed: weights rounded and packed.
        launches: operations on one number, one after the other.
        read: bytes (of FP16 weights) of the model, as its files lie now; `DISK` where they are not here.
        hashed: bytes of SHA-256.
    """

    product: float
    exact: float
    fitted: float
    packed: float
    launches: float
    read: float = DISK
    hashed: float = DISK

    def describe(self) -> str:
        """The two that matter most, in words."""
        return f"{self.product / 1e9:,.0f} GFLOP/s of products, {self.packed / 1e6:,.1f} million weights rounded per second"


def measure_rates(source: Source, recipe: Recipe, device: str, dtype: torch.dtype) -> Rates:
    """Time products, rounding and reading on this device; takes about two seconds.

    Args:
        source: the model, whose widths the products have; where it is local, one tensor of it is read.
        recipe: whose grids weights are rounded to.
        device: "cpu", "cuda" or "cuda:N".
        dtype: type that decoder blocks run in.
    """
    a, kind = source.architecture, torch.device(device).type
    layout = LinearLayout(max(1, WEIGHTS[kind] // a.hidden), a.hidden, recipe.bits, min(recipe.group_size, a.hidden))
    weight, one = torch.randn(layout.out_features, a.hidden, device=device), torch.zeros((), device=device)

    def launch() -> None:
        for _ in range(100):
            one.add_(1)

    content = bytes(1 << 22)
    return Rates(
        _products(a, device, dtype),
        _products(a, device, torch.float32),
        _per_second(lambda: round_to_nearest(weight, layout), weight.numel(), device),
        _per_second(lambda: quantize_linear(weight, layout), weight.numel(), device),
        _per_second(launch, 100, device),
        _read(source),
        _per_second(lambda: hashlib.sha256(content).digest(), len(content), "cpu"),
    )


def _products(a: Architecture, device: str, dtype: torch.dtype) -> float:
    kind = torch.device(device).type
    outputs = min(a.intermediate, OUTPUTS[kind])
    x, w = (torch.randn(rows, a.hidden, device=device).to(dtype) for rows in (TOKENS[kind], outputs))
    return _per_second(lambda: torch.nn.functional.linear(x, w), 2 * TOKENS[kind] * a.hidden * outputs, device)


def _read(source: Source) -> float:
    """Bytes per second of reading the first block's widest layer; the files may be in the operating system's cache."""
    if not source.files:
        return DISK
    name = f"{source.architecture.block_prefix(0)}{LINEARS[SITES['mlp_out'][0]]}.weight"
    size = 2 * torch.Size(source.architecture.shape("down")).numel()
    return _per_second(lambda: source.read(name).clone(), size, "cpu")


def _per_second(call: Callable[[], object], amount: float, device: str) -> float:
    """`amount` over the median time of a call, the first one left out."""
    seconds: list[float] = []
    call()
    while sum(seconds) < SECONDS or len(seconds) < 3:
        _finish(device)
        start = time.perf_counter()
        call()
        _finish(device)
        seconds.append(time.perf_counter() - start)
    return amount / sorted(seconds)[len(seconds) // 2]


def _finish(device: str) -> None:
    if device.startswith("cuda"):
        torch.cuda.synchronize()
