"""`rosaq verify`."""

from pathlib import Path
from typing import Annotated

import typer

from rosaq_cli.screen import results


def verify(checkpoint: Annotated[Path, typer.Argument(help="Folder of a rosaq checkpoint.", show_default=False)]) -> None:
    """Check a checkpoint's files against their recorded hashes, and its tensors against its config."""
    from rosaq.engines.loading import verify_checkpoint

    manifest = verify_checkpoint(checkpoint)
    results.print(f"{checkpoint}: whole, format {manifest['format_version']}, {len(manifest['files'])} file(s)", soft_wrap=True, highlight=False)
