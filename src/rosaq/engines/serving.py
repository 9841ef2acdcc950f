"""The command that serves a checkpoint with vLLM: vLLM's own, with defaults that fit the checkpoint."""

import importlib.util
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from transformers import AutoConfig

from rosaq.checkpoint import is_checkpoint, verify

CONTEXT = 8192  # tokens; longer contexts are asked for, since the KV cache must hold one


def serve_command(checkpoint: str | Path, options: Sequence[str]) -> list[str]:
    """Program and arguments of `vllm serve` for a checkpoint, whose hashes are checked.

    Args:
        checkpoint: folder.
        options: vLLM's, passed on as they are; where they do not say, the type is the checkpoint's (bfloat16 on the CPU), the context the model's
            up to 8192 tokens, and the model is served under its folder's name.

    Raises:
        ValueError: vLLM is not installed, or the folder is no rosaq checkpoint.
    """
    folder = Path(checkpoint)
    if not folder.is_dir() or not is_checkpoint(folder):
        raise ValueError(f"{folder}: not the folder of a rosaq checkpoint; 'rosaq quantize' makes one, 'vllm serve' takes other models")
    if not vllm_installed():
        raise ValueError("vLLM is not installed in this environment; install it with pip install 'rosaq[vllm]', or use 'rosaq generate'")
    verify(folder)
    config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    defaults = {
        "--dtype": str(config.dtype).removeprefix("torch.") if torch.cuda.is_available() else "bfloat16",
        "--max-model-len": str(min(config.max_position_embeddings, CONTEXT)),
        "--served-model-name": folder.resolve().name,
    }
    given = {option.partition("=")[0].replace("_", "-") for option in options}
    command = [sys.executable, "-m", "vllm.entrypoints.cli.main", "serve", str(folder)]
    for name, value in defaults.items():
        if name not in given:
            command += [name, value]
    return command + list(options)


def vllm_installed() -> bool:
    """Whether vLLM can be imported; a folder that happens to have its name does not count."""
    try:
        return importlib.util.find_spec("vllm.entrypoints") is not None
    except ModuleNotFoundError:
        return False
