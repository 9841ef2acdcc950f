"""Times one quantized linear layer y = x W^T on the GPU: our kernels, cuBLAS, and, where vLLM is importable, Marlin and Machete.

`rosaq` is the kernel that `kernels.choose` takes, `triton` our portable one at the numbers of tokens that it multiplies itself.

Every weight is replicated so that a pass over the copies exceeds the L2 cache twice over; the copies run inside one CUDA graph;
the figure is the median replay divided by the number of copies, in microseconds. The limit is the larger of the bytes of the
weight (scales included, no salient part) over the measured copy bandwidth, and of 2 M K N over the measured dense rate.
Salient channels are stored and multiplied on top of it: the peers have none. Marlin and Machete are timed at 4 bits only, which is what they
take, on random words: their time does not depend on the weight. Also timed: repacking a layer from the checkpoint's tensors.
"""

import importlib.util
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch

from rosaq import kernels
from rosaq.engines.dummy import random_tensors
from rosaq.kernels import cuda, portable
from rosaq.layout import LinearLayout

TFLOPS = 790e12  # dense float16 products on an H200, random data
COPIES_BYTES = 300_000_000  # per pass, against 50 to 60 MB of L2
BATCHES = (1, 16, 64, 128, 256, 1024, 4096)
SHOWN = ("rosaq", "triton", "cublas", "marlin", "machete")
OWN = SHOWN[:2]  # the others are peers
Calls = Callable[[torch.Tensor], list[Callable[[], Any]]]  # x -> one call per copy of a weight


def llama2_7b(bits: int = 4, group_size: int = 128, salient_bits: int = 16) -> dict[str, LinearLayout]:
    """The fused linear layers of Llama-2-7B as ROSAQ stores them."""
    common: dict[str, Any] = {"bits": bits, "group_size": group_size, "salient_bits": salient_bits}
    return {
        "llama2 qkv": LinearLayout(12288, 4096, salient=128, **common),
        "llama2 o": LinearLayout(4096, 4096, blocks=32, salient=32, **common),
        "llama2 gate_up": LinearLayout(22016, 4096, salient=128, **common),
        "llama2 down": LinearLayout(4096, 11008, **common),
    }


def llama3_8b(bits: int = 4, group_size: int = 128, salient_bits: int = 16) -> dict[str, LinearLayout]:
    """The fused linear layers of Llama-3-8B as ROSAQ stores them."""
    common: dict[str, Any] = {"bits": bits, "group_size": group_size, "salient_bits": salient_bits}
    return {
        "llama3 qkv": LinearLayout(6144, 4096, salient=128, **common),
        "llama3 o": LinearLayout(4096, 4096, blocks=32, salient=32, **common),
        "llama3 gate_up": LinearLayout(28672, 4096, salient=128, **common),
        "llama3 down": LinearLayout(4096, 14336, **common),
    }


def microseconds(calls: Sequence[Callable[[], Any]], replays: int = 30) -> float:
    """Median time of one of `calls` (closures over different copies of a weight), in microseconds, from replays of one CUDA graph."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for call in list(calls)[:2]:
            call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    times = []
    for _ in range(replays + 3):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end) / len(calls) * 1e3)
    return statistics.median(times[3:])


def copy_bandwidth() -> float:
    """Bytes per second of a large copy by a kernel, read plus written (a captured `copy_` runs on the slower copy engine)."""
    source = torch.empty(1 << 29, dtype=torch.int32, device="cuda").random_(0, 255)
    target = torch.empty_like(source)
    return 2 * (1 << 31) / (microseconds([lambda: torch.add(source, 1, out=target)], 10) * 1e-6)


def our_calls(layout: LinearLayout, tensors: dict[str, torch.Tensor], dtype: torch.dtype) -> tuple[Calls, float]:
    """Calls of our kernel over copies of the prepared weight, and the milliseconds that repacking took."""
    kernel = kernels.choose(layout, tensors["qweight"].device, dtype, ("cuda", "triton", "dequantized"))
    first = kernel.prepare(layout, tensors, dtype)
    torch.cuda.synchronize()
    start = time.perf_counter()
    kernel.prepare(layout, tensors, dtype)
    torch.cuda.synchronize()
    repack_ms = (time.perf_counter() - start) * 1e3
    if kernel is cuda:
        copies = max(2, COPIES_BYTES // first.stream.numel())
        prepared = [replace(first, stream=first.stream.clone()) for _ in range(copies)]
    else:
        copies = max(2, COPIES_BYTES // tensors["qweight"].nbytes)
        prepared = [kernel.prepare(layout, {name: t.clone() for name, t in tensors.items()}, dtype) for _ in range(copies)]
    return lambda x: [lambda p=p: kernel.run(x, p) for p in prepared], repack_ms  # type: ignore[misc]


def triton_calls(layout: LinearLayout, dtype: torch.dtype) -> dict[str, Calls]:
    """Calls of the portable kernel over copies of the stored tensors, where Triton is installed."""
    if portable.why_not(layout, torch.device("cuda"), dtype) is not None:
        return {}
    tensors = random_tensors(layout, "cuda")
    copies = range(max(2, COPIES_BYTES // tensors["qweight"].nbytes))
    prepared = [portable.prepare(layout, {name: t.clone() for name, t in tensors.items()}, dtype) for _ in copies]
    return {"triton": lambda x: [lambda p=p: portable.run(x, p) for p in prepared]}  # type: ignore[misc]


def peer_calls(layout: LinearLayout, dtype: torch.dtype) -> dict[str, Calls]:
    """cuBLAS, and vLLM's Marlin and Machete on the whole layer at 4 bits (they know no salient channels)."""
    k, n = layout.in_features, layout.out_features
    plain = [torch.randn(n, k, device="cuda", dtype=dtype) * 0.02 for _ in range(max(2, COPIES_BYTES // (2 * k * n)))]
    calls: dict[str, Calls] = {"cublas": lambda x: [lambda w=w: torch.nn.functional.linear(x, w) for w in plain]}  # type: ignore[misc]
    if layout.bits != 4 or layout.group_size != 128 or importlib.util.find_spec("vllm") is None:
        return calls
    from vllm import _custom_ops as ops  # noqa: PLC0415
    from vllm.model_executor.layers.quantization.utils.marlin_utils import marlin_make_workspace_new  # noqa: PLC0415
    from vllm.scalar_type import scalar_types  # noqa: PLC0415

    kind, empty = scalar_types.uint4b8, torch.empty(0, dtype=torch.int, device="cuda")
    workspace = marlin_make_workspace_new(empty.device)
    copies = range(max(2, COPIES_BYTES // (k * n // 2)))

    def words(*shape: int) -> torch.Tensor:
        return torch.randint(-(1 << 31), (1 << 31) - 1, shape, dtype=torch.int32, device="cuda")

    scales = [torch.rand(k // 128, n, device="cuda").to(dtype) * 0.01 for _ in copies]
    marlin = [(words(k // 16, 2 * n), s) for s in scales]
    calls["marlin"] = lambda x: [
        lambda p=p: ops.marlin_gemm(  # type: ignore[misc]
            x, None, p[0], None, p[1], None, None, None, empty, empty, workspace, kind, x.shape[0], n, k, True, False, True, False
        )
        for p in marlin
    ]
    machete = [(ops.machete_prepack_B(words(n, k // 8).t(), dtype, kind, dtype), s) for s in scales]
    calls["machete"] = lambda x: [lambda p=p: ops.machete_mm(x, p[0], kind, x.dtype, p[1], None, 128) for p in machete]  # type: ignore[misc]
    return calls


def default_layouts(bits: Sequence[int] = (4, 3)) -> dict[str, LinearLayout]:
    """The fused layers of both models at each width; at 3 bits the 8192 x 8192 layer, too, that others publish figures for."""
    layouts: dict[str, LinearLayout] = {}
    for width in bits:
        own = {**llama2_7b(width), **llama3_8b(width), **({"square": LinearLayout(8192, 8192, 3, 128)} if width == 3 else {})}
        layouts |= {name if width == 4 else f"{name} int{width}": layout for name, layout in own.items()}
    return layouts


def benchmark_kernels(
    layouts: dict[str, LinearLayout] | None = None,
    batches: Sequence[int] = BATCHES,
    dtype: torch.dtype = torch.float16,
    peers: bool = True,
) -> list[dict[str, Any]]:
    """Time every layer at every batch; print the table and return its rows.

    Args:
        layouts: layers by name; Llama-2-7B's and Llama-3-8B's at INT4 and INT3, group 128, by default.
        batches: numbers of tokens M.
        dtype: type of the activations.
        peers: also time cuBLAS and, where vLLM is importable, Marlin and Machete.

    Raises:
        RuntimeError: there is no CUDA GPU.
    """
    if not torch.cuda.is_available():
        raise RuntimeError("`benchmark kernels` times GPU kernels and finds no CUDA GPU")
    bandwidth = copy_bandwidth()
    _show(f"{torch.cuda.get_device_name()}, copy bandwidth {bandwidth / 1e12:.2f} TB/s, {dtype}, torch {torch.__version__}")
    kernels_shown = "".join(f"{name:>8s}" for name in SHOWN)
    _show(f"{'layer':>20s} bits     M{kernels_shown}  limit  /peer  share  (us)")
    rows = []
    for name, layout in (layouts or default_layouts()).items():
        ours, repack_ms = our_calls(layout, random_tensors(layout, "cuda"), dtype)
        calls = {"rosaq": ours, **triton_calls(layout, dtype), **(peer_calls(layout, dtype) if peers else {})}
        for tokens in batches:
            x = torch.randn(tokens, layout.in_features, device="cuda", dtype=dtype)
            timed = {kernel: over for kernel, over in calls.items() if kernel != "triton" or tokens <= portable.MAX_TOKENS}
            times = {kernel: microseconds(over(x), 30 if tokens <= 256 else 8) for kernel, over in timed.items()}
            rows.append({**_row(name, layout, tokens, dtype, times, bandwidth), "repack_ms": repack_ms})
        _show(f"{name:>20s} {layout.bits:4d} repacked in {repack_ms:.1f} ms")
        del calls, ours
        torch.cuda.empty_cache()
    _print_sums(rows)
    return rows


def _show(line: str) -> None:
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


def _row(name: str, layout: LinearLayout, tokens: int, dtype: torch.dtype, times: dict[str, float], bandwidth: float) -> dict[str, Any]:
    """One row of the table, printed as it is made."""
    k, n = layout.in_features, layout.out_features
    limit = max(k * n * (layout.bits / 8 + 2 / layout.group_size) / bandwidth, 2 * tokens * k * n / TFLOPS) * 1e6
    best = min((time for kernel, time in times.items() if kernel not in OWN), default=None)
    row: dict[str, Any] = {
        "layer": name, "in_features": k, "out_features": n, "bits": layout.bits, "group_size": layout.group_size,
        "salient": layout.blocks * layout.salient, "salient_bits": layout.salient_bits, "tokens": tokens, "dtype": str(dtype),
        "microseconds": times, "limit_us": limit, "to_best_peer": None if best is None else times["rosaq"] / best,
        "share_of_limit": limit / times["rosaq"],
    }  # fmt: skip
    shown = [f"{times[kernel]:7.1f}" if kernel in times else "      -" for kernel in SHOWN]
    ratio = "     -" if best is None else f"{row['to_best_peer']:6.2f}"
    _show(f"{name:>20s} {layout.bits:4d} {tokens:5d} {' '.join(shown)} {limit:6.1f} {ratio} {row['share_of_limit']:6.2f}")
    return row


def _print_sums(rows: list[dict[str, Any]]) -> None:
    """Sum over the layers of each model, per number of tokens."""
    keys = sorted({(row["layer"].split()[0], row["bits"], row["tokens"]) for row in rows})
    for model, bits, tokens in keys:
        mine = [row for row in rows if (row["layer"].split()[0], row["bits"], row["tokens"]) == (model, bits, tokens)]
        ours = sum(row["microseconds"]["rosaq"] for row in mine)
        best = [min((t for kernel, t in row["microseconds"].items() if kernel not in OWN), default=float("nan")) for row in mine]
        _show(f"sum over {len(mine)} layers of {model}, INT{bits}, M = {tokens}: rosaq {ours:.1f} us, best peers {sum(best):.1f} us")
