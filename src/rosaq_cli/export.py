"""`rosaq export`."""

from pathlib import Path
from typing import Annotated

import typer

from rosaq_cli.screen import results, show_json, silence_transformers, stage_bars


def export(
    checkpoint: Annotated[Path, typer.Argument(help="Folder of a rosaq checkpoint.", show_default=False)],
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder to make; must be empty or not exist.", show_default=False)],
    form: Annotated[str, typer.Option("--format", help="dense; or compressed-tensors (W4A16), for recipes without salient channels.")] = "dense",
    dtype: Annotated[str, typer.Option(help="float16, bfloat16 or float32.")] = "float16",
    json_output: Annotated[bool, typer.Option("--json", help="Print what was written as JSON.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", help="No progress bars and no message.")] = False,
) -> None:
    """Write a checkpoint as an ordinary one, for engines that do not know rosaq's format."""
    from rosaq.engines.export import export as run

    silence_transformers()
    with stage_bars(quiet or json_output) as progress:
        run(checkpoint, output, form, dtype, progress)
    if json_output:
        size = sum(file.stat().st_size for file in output.iterdir())
        show_json({"output": str(output), "format": form, "dtype": dtype, "bytes": size})
    elif not quiet:
        results.print(f"{output}: {form}, {dtype}", soft_wrap=True, highlight=False)
