"""`rosaq benchmark`: measurements against peers in the same run."""

import contextlib
import json
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from rosaq_cli.screen import errors, show_json, show_table, stage_bars

app = typer.Typer(help="Time rosaq against its peers in one run.", no_args_is_help=True)


@app.callback()
def benchmark() -> None:
    """Time rosaq against its peers in one run."""


@app.command()
def kernels(
    bits: Annotated[list[int], typer.Option(help="Bits of a quantized weight, 2, 3 or 4; may be repeated.")] = [4, 3],  # noqa: B006
    peers: Annotated[bool, typer.Option(help="Also time cuBLAS and, where vLLM is installed, Marlin and Machete.")] = True,
    dtype: Annotated[str, typer.Option(help="float16 or bfloat16.")] = "float16",
    output: Annotated[Path | None, typer.Option("--output", "-o", help="JSON file to write.", show_default="none")] = None,
    json_output: Annotated[bool, typer.Option("--json", help="Print the rows as JSON; the table goes to standard error.")] = False,
) -> None:
    """Time one linear layer on the GPU: microseconds, ratio to the best peer, share of the memory or arithmetic limit."""
    import torch

    from rosaq.benchmark.kernels import benchmark_kernels, default_layouts

    if dtype not in ("float16", "bfloat16"):
        raise ValueError(f"dtype {dtype!r}; allowed are float16, bfloat16")
    if not set(bits) <= {2, 3, 4}:
        raise ValueError(f"bits {', '.join(map(str, bits))}; allowed are 2, 3, 4")
    if not torch.cuda.is_available():
        raise ValueError("rosaq benchmark kernels times GPU kernels, and PyTorch sees no CUDA GPU here")
    check_output(output)
    with contextlib.redirect_stdout(sys.stderr if json_output else sys.stdout):
        rows = benchmark_kernels(default_layouts(bits), dtype=getattr(torch, dtype), peers=peers)
    result = {"hardware": torch.cuda.get_device_name(), "torch": torch.__version__, "rows": rows}
    if output is not None:
        write_result(output, result)
    if json_output:
        show_json(result)


def check_output(output: Path | None) -> None:
    """Refuse a JSON file that could not be written, before anything is timed."""
    from rosaq.new_folders import check_writable

    if output is not None:
        check_writable(output.parent)


def write_result(output: Path, result: dict[str, Any]) -> None:
    """Write a benchmark's figures as JSON, for `rosaq report`."""
    from rosaq.comparison.results import write_json

    write_json(output, result)


@app.command()
def quantize(
    shape: Annotated[str, typer.Argument(help="llama-2-7b, llama-3-8b, llama-2-70b, llama-3-70b or tiny.", show_default=False)],
    folder: Annotated[Path, typer.Option(help="Folder on the disk to measure; the random model stays in it.", show_default=False)],
    blocks: Annotated[int | None, typer.Option(help="Make so many of the model's blocks only, and extrapolate.", show_default="all")] = None,
    recipe: Annotated[str, typer.Option(help="Shipped recipe or a .toml file.")] = "rosaq-paper",
    group_size: Annotated[int | None, typer.Option(help="Channels that share a scale.", show_default="recipe's")] = None,
    salient: Annotated[int | None, typer.Option(help="Channels of q, k, v, gate, up that stay precise.", show_default="recipe's")] = None,
    salient_per_head: Annotated[int | None, typer.Option(help="Channels of each head of o that stay precise.", show_default="recipe's")] = None,
    target_bits: Annotated[float | None, typer.Option(help="Bits per weight to allocate.", show_default="recipe's")] = None,
    samples: Annotated[int, typer.Option(help="Calibration windows, of random tokens.")] = 128,
    seq_len: Annotated[int, typer.Option(help="Tokens per calibration window.")] = 2048,
    warm: Annotated[bool, typer.Option("--warm", help="Let the model's files be in the operating system's cache.")] = False,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")] = "auto",
    max_memory: Annotated[str | None, typer.Option(help="Host memory to stay under, such as 8GiB.", show_default="what is free")] = None,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="JSON file to write.", show_default="none")] = None,
    json_output: Annotated[bool, typer.Option("--json", help="Print the figures as JSON.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", help="No progress bars.")] = False,
) -> None:
    """Time quantization from shards on disk to a checkpoint on disk: random weights of a real shape, each stage's share.

    Several GPUs: torchrun --nproc-per-node N -m rosaq benchmark quantize ...
    """
    from rosaq.benchmark.quantizing import Case, benchmark_quantize
    from rosaq.device import resolve_device
    from rosaq.distributed import current_ranks, joined
    from rosaq.memory import parse_size
    from rosaq.recipe import load_recipe
    from rosaq.run import Means

    chosen = load_recipe(recipe).replace(group_size=group_size, salient=salient, salient_per_head=salient_per_head, target_bits=target_bits)
    case, means = Case(shape, blocks, samples, seq_len, warm), Means(None if max_memory is None else parse_size(max_memory))
    check_output(output)
    with joined(device) as own_device:
        first = current_ranks().first
        with stage_bars(quiet or json_output or not first) as progress:
            figures = benchmark_quantize(case, folder, chosen, resolve_device(own_device), means, progress)
    if first and output is not None:
        write_result(output, figures)
    if first and json_output:
        show_json(figures)
    elif first:
        _show_stages(figures)


def _show_stages(figures: dict[str, Any]) -> None:
    report, seconds, all_blocks = figures["report"], figures["report"]["seconds"], figures["seconds_of_all_blocks"]
    rows = [[stage, f"{time:.2f}", f"{100 * time / sum(seconds.values()):.1f} %", f"{all_blocks[stage]:.1f}"] for stage, time in seconds.items()]
    rows.append(["in all", f"{sum(seconds.values()):.2f}", "", f"{sum(all_blocks.values()):.1f}"])
    part, whole = figures["blocks"], figures["blocks_of_model"]
    cached = "cached" if figures["warm"] else "not cached"
    tokens = f"{figures['tokens'][0]} x {figures['tokens'][1]} tokens"
    title = f"{figures['shape']}, {part} of {whole} blocks, {report['recipe']['name']}, {tokens}, files {cached}"
    column = f"s, all {whole} blocks" + (", extrapolated" if part < whole else "")
    show_table(f"{title}; {figures['ranks']} x {figures['hardware']}", ["stage", "s", "share", column], rows)
    peaks = [["device", report["peak_device_bytes"]], ["host", report["peak_host_bytes"]]]
    show_table(f"Activations kept: {report['activations']}", ["peak memory", "GiB"], [[name, f"{size / 2**30:.2f}"] for name, size in peaks])


@app.command()
def decode(
    model: Annotated[str, typer.Argument(help="llama-2-7b and other shapes, a model folder (its sizes), or a rosaq checkpoint.")] = "llama-2-7b",
    engine: Annotated[list[str], typer.Option(help="vllm, transformers, transformers-compiled; may be repeated.")] = ["vllm", "transformers"],  # noqa: B006
    weights: Annotated[
        list[str],
        typer.Option(help="fp16, rosaq, machete, marlin, w4a16 (vLLM's own choice); may be repeated.", show_default="all that can run here"),
    ] = [],  # noqa: B006
    pairs: Annotated[
        str, typer.Option(help="batch/tokens, comma separated: so many tokens are given and generated.")
    ] = "1/128,16/128,64/256,128/128",
    recipe: Annotated[str, typer.Option(help="Recipe of random weights; a checkpoint has its own.")] = "rosaq-int4",
    group_size: Annotated[int | None, typer.Option(help="Channels that share a scale.", show_default="recipe's")] = None,
    dtype: Annotated[str, typer.Option(help="float16, bfloat16; auto: bfloat16 on the CPU and with an FP8 KV cache.")] = "auto",
    kv_cache_dtype: Annotated[str, typer.Option(help="auto or fp8, in vLLM.")] = "auto",
    tensor_parallel: Annotated[int, typer.Option(help="GPUs that vLLM spreads a model over.")] = 1,
    repeats: Annotated[int, typer.Option(help="Runs of each pair.")] = 2,
    eager: Annotated[bool | None, typer.Option(help="vLLM without CUDA graphs and compiler.", show_default="on the CPU only")] = None,
    at_once: Annotated[int, typer.Option(help="Processes that start together, which takes most of the time; they are timed in turn.")] = 1,
    vllm_options: Annotated[str, typer.Option(help='More arguments of vLLM\'s LLM as JSON: {"attention_backend": "TRITON_ATTN"}.')] = "{}",
    output: Annotated[Path | None, typer.Option("--output", "-o", help="JSON file to write.", show_default="none")] = None,
    json_output: Annotated[bool, typer.Option("--json", help="Print JSON instead of the table.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", help="No line for each case while they run.")] = False,
) -> None:
    """Time decoding by the paper's protocol: milliseconds per step, and speed against FP16 and the best 4-bit peer."""
    import torch

    from rosaq import load_recipe
    from rosaq.benchmark.decoding import Settings, Timing, benchmark_decoding
    from rosaq.engines.serving import vllm_installed

    cuda = torch.cuda.is_available()
    chosen = load_recipe(recipe).replace(group_size=group_size)
    kind = dtype if dtype != "auto" else "float16" if cuda and kv_cache_dtype != "fp8" else "bfloat16"
    without_graphs = not cuda if eager is None else eager
    settings = Settings(_pairs(pairs), kind, kv_cache_dtype, tensor_parallel, repeats, without_graphs, at_once, _options(vllm_options))
    if "vllm" in engine and not vllm_installed():
        raise ValueError("vLLM is not installed in this environment; install it (pip install 'rosaq[vllm]') or give --engine transformers")

    check_output(output)

    def told(timing: Timing, so_far: dict[str, Any]) -> None:
        what = timing.failure or ", ".join(f"{pair}: {step:.2f} ms" for pair, step in timing.steps_ms.items())
        if not quiet:
            errors.print(f"{timing.engine} {timing.weights}: {what}", markup=False, highlight=False, soft_wrap=True)
        if output is not None:  # after each case, so that a run that is stopped keeps what it has
            write_result(output, so_far)

    result = benchmark_decoding(model, chosen, settings, engine, weights or ["fp16", "rosaq", *(["machete", "marlin"] if cuda else ["w4a16"])], told)
    if json_output:
        show_json(result)
    else:
        _show_rows(result)
    if result["failures"]:
        raise ValueError(f"{len(result['failures'])} of the cases failed, as told above")


def _options(text: str) -> dict[str, Any]:
    try:
        found = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"vllm-options {text!r} is not JSON: {error}") from error
    if not isinstance(found, dict):
        raise ValueError(f"vllm-options {text!r}; it is an object of names and values")
    return found


def _pairs(text: str) -> tuple[tuple[int, int], ...]:
    found = []
    for part in text.split(","):
        batch, _, tokens = part.partition("/")
        if not (batch.strip().isdigit() and tokens.strip().isdigit()):
            raise ValueError(f"pairs {text!r}; each is batch/tokens, such as 1/128,16/128")
        found.append((int(batch), int(tokens)))
    return tuple(found)


def _show_rows(result: dict[str, Any]) -> None:
    def ratio(value: float | None) -> str:
        return "" if value is None else f"{value:.2f}"

    lines = [
        [
            f"{row['engine']} {row['weights']}", f"{row['batch']}/{row['tokens']}", f"{row['step_ms']:.2f}", f"{row['throughput']:.0f}",
            ratio(row["to_fp16"]), ratio(row["to_best_peer"]),
        ]
        for row in sorted(result["rows"], key=lambda row: (row["batch"], row["tokens"], row["engine"]))
    ]  # fmt: skip
    settings = result["settings"]
    title = f"{result['model']}, {settings['dtype']}, KV cache {settings['kv_cache_dtype']}, recipe {result['recipe']}"
    show_table(title, ["", "batch/tokens", "ms per step", "tokens/s", "speed to FP16", "to best peer"], lines)
