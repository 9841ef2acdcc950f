"""`rosaq verify`."""

from pathlib import Path
from typing import Annotated

import typer

from rosaq_cli.screen import results, show_json, show_table, stage_bars


def verify(
    checkpoint: Annotated[Path, typer.Argument(help="Folder of a rosaq checkpoint.", show_default=False)],
    against: Annotated[str | None, typer.Option(help="Original model: adds the error of every block.", show_default="none")] = None,
    device: Annotated[str, typer.Option(help="For --against: auto, cpu, cuda or cuda:N.")] = "auto",
    json_output: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", help="No progress bars.")] = False,
) -> None:
    """Check a checkpoint's files against their recorded hashes, its tensors against its config, and that they are finite.

    With --against, the original's and the checkpoint's decoder blocks are run on the original's hidden states, of
    token ids drawn at random, and the relative error of what each adds to the residual stream is shown.
    """
    from rosaq.device import resolve_device
    from rosaq.engines.loading import verify_checkpoint

    manifest = verify_checkpoint(checkpoint)
    parts = []
    if against is not None:
        from rosaq.source import open_source
        from rosaq.verification import part_errors

        with stage_bars(quiet or json_output) as progress:
            parts = part_errors(checkpoint, open_source(against), resolve_device(device), progress)
    if json_output:
        show_json({"format_version": manifest["format_version"], "files": manifest["files"], "errors": [vars(part) for part in parts]})
        return
    results.print(f"{checkpoint}: whole, format {manifest['format_version']}, {len(manifest['files'])} file(s)", soft_wrap=True, highlight=False)
    if parts:
        show_table(f"Against {against}", ["part", "relative error"], [[part.part, f"{part.relative_error:.4f}"] for part in parts])
