"""The command that serves a checkpoint with vLLM: vLLM's own, with defaults that fit the checkpoint."""

import importlib.util
import os
import sys
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import psutil
import torch
import yaml
from transformers import AutoConfig, PreTrainedConfig

from rosaq.checkpoint import is_checkpoint, verify
from rosaq.memory import available_bytes

CPU_SHARE = 0.5  # of the free memory, for weights and KV cache; vLLM takes 0.92 of all there is, and stops where that is not free
# Inductor's small kernels on Hopper start while the one before them ends, as ours do: 3 % of a step of one sequence (docs/results.md).
OVERLAP = '{"inductor_compile_config": {"triton.enable_pdl": true}}'
ATTENTION = "CUSTOM"  # vLLM's name of the place of our attention (vllm_attention.py), as fast as its own on Hopper or faster (docs/results.md)
HEAD_SIZES, CACHES = (64, 128), ("auto", "float16", "bfloat16", "fp8", "fp8_e4m3")  # what that computes itself
CONTEXT = 8192  # tokens; longer contexts are asked for, since the KV cache must hold one


def serve_command(checkpoint: str | Path, options: Sequence[str]) -> list[str]:
    """Program and arguments of `vllm serve` for a checkpoint, whose hashes are checked.

    Args:
        checkpoint: folder.
        options: vLLM's, passed on as they are; where neither they nor their `--config` file say, the type is the checkpoint's (bfloat16 on the
            CPU), the context the model's up to 8192 tokens, the model is served under its folder's name, on the CPU it takes half of the
            free memory, and on Hopper compiled kernels overlap and the attention is rosaq's where it computes the model's.

    Raises:
        ValueError: vLLM is not installed, the folder is no rosaq checkpoint, or the `--config` file is no YAML of names and values.
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
    given = given_options(options)
    if torch.cuda.is_available() and torch.cuda.get_device_capability() >= (9, 0) and "-cc" not in given:
        defaults["--compilation-config"] = OVERLAP
    if torch.cuda.is_available() and torch.cuda.get_device_capability() == (9, 0) and _has_our_attention(config, defaults | given):
        defaults["--attention-backend"] = ATTENTION
    if not torch.cuda.is_available() and "VLLM_CPU_KVCACHE_SPACE" not in os.environ and "--kv-cache-memory-bytes" not in given:
        defaults["--gpu-memory-utilization"] = f"{CPU_SHARE * available_bytes() / psutil.virtual_memory().total:.2f}"
    command = [sys.executable, "-m", "vllm.entrypoints.cli.main", "serve", str(folder)]
    for name, value in defaults.items():
        if name not in given:
            command += [name, value]
    return command + list(options)


def _has_our_attention(config: PreTrainedConfig, options: dict[str, str]) -> bool:
    """Whether rosaq's attention computes all of a model's by itself, in the type and from the cache that vLLM's options name."""
    window = getattr(config, "sliding_window", None) is not None and getattr(config, "use_sliding_window", True)
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    halves = options["--dtype"] in ("float16", "half", "bfloat16", "auto")
    return size in HEAD_SIZES and not window and halves and options.get("--kv-cache-dtype", "auto") in CACHES


def given_options(options: Sequence[str]) -> dict[str, str]:
    """What vLLM's options are set to, by the arguments and by the file that `--config` names; names with "-" for "_", without what follows a dot."""
    given = {}
    for option, following in pairwise([*options, ""]):
        name, joined, value = option.partition("=")
        if name.startswith("-"):
            given[name.partition(".")[0].replace("_", "-")] = value if joined else following
    file = Path(given.get("--config", ""))
    if not file.is_file():
        return given
    try:
        stored = dict(yaml.safe_load(file.read_text()) or {})
    except (yaml.YAMLError, TypeError, ValueError) as error:
        raise ValueError(f"{file}: not YAML of names and values, which vLLM's --config takes") from error
    return {f"--{name}".replace("_", "-"): str(value) for name, value in stored.items()} | given


def vllm_installed() -> bool:
    """Whether vLLM can be imported; a folder that happens to have its name does not count."""
    try:
        return importlib.util.find_spec("vllm.entrypoints") is not None
    except ModuleNotFoundError:
        return False
