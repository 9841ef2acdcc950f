"""`rosaq benchmark`: measurements against peers in the same run."""

from typing import Annotated

import typer

from rosaq_cli.screen import show_json

app = typer.Typer(help="Time rosaq against its peers in one run.", no_args_is_help=True)


@app.callback()
def benchmark() -> None:
    """Time rosaq against its peers in one run."""


@app.command()
def kernels(
    peers: Annotated[bool, typer.Option(help="Also time cuBLAS and, where vLLM is installed, Marlin and Machete.")] = True,
    dtype: Annotated[str, typer.Option(help="float16 or bfloat16.")] = "float16",
    json_output: Annotated[bool, typer.Option("--json", help="Print the rows as JSON after the table.")] = False,
) -> None:
    """Time one linear layer on the GPU: microseconds, ratio to the best peer, share of the memory or arithmetic limit."""
    import torch

    from rosaq.benchmark.kernels import benchmark_kernels

    if dtype not in ("float16", "bfloat16"):
        raise ValueError(f"dtype {dtype!r}; allowed are float16, bfloat16")
    if not torch.cuda.is_available():
        raise ValueError("rosaq benchmark kernels times GPU kernels, and PyTorch sees no CUDA GPU here")
    rows = benchmark_kernels(dtype=getattr(torch, dtype), peers=peers)
    if json_output:
        show_json({"rows": rows})
