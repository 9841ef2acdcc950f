"""`rosaq serve`."""

from pathlib import Path
from typing import Annotated

import typer

SETTINGS = {"allow_extra_args": True, "ignore_unknown_options": True}


def serve(
    context: typer.Context,
    checkpoint: Annotated[Path, typer.Argument(help="Folder of a rosaq checkpoint.", show_default=False)],
) -> None:
    """Serve a checkpoint with vLLM over the OpenAI protocol.

    Every other option goes to `vllm serve` as it is, such as --port 8000, --tensor-parallel-size 2, --kv-cache-dtype fp8.
    'vllm serve --help' lists them. Filled in where you do not say: --dtype, --max-model-len (8192 tokens at most), --served-model-name; on Hopper
    --compilation-config and --attention-backend; without a GPU --gpu-memory-utilization.
    """
    import os

    from rosaq.engines.serving import serve_command

    command = serve_command(checkpoint, context.args)
    os.execv(command[0], command)  # vLLM is then this very process, so signals and exit codes are its own
