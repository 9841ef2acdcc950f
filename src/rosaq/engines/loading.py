"""A model to run, whatever it is: a rosaq checkpoint, an ordinary one, or a GGUF file."""

from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from rosaq.checkpoint import is_checkpoint, verify
from rosaq.device import resolve_device
from rosaq.engines.dense import dense_fits, dense_model
from rosaq.engines.transformers import RosaqConfig, RosaqQuantizer, register
from rosaq.linear import RosaqLinear
from rosaq.safetensors_folder import SafetensorsFolder
from rosaq.skeleton import full_model, meta_model
from rosaq.source import open_source, read_tokenizer

WEIGHTS = ("auto", "dense", "packed")
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


def resolve_dtype(dtype: str, stored: torch.dtype, cpu: torch.dtype, device: str) -> torch.dtype:
    """A torch type out of "auto", "float32", "float16" or "bfloat16".

    "auto" is the type that the model is stored in on a GPU and `cpu` on the CPU, where float16 is slow.
    """
    check_dtype(dtype)
    if dtype == "auto":
        return cpu if device == "cpu" else stored
    return DTYPES[dtype]


def check_dtype(dtype: str) -> None:
    """Refuse what names no type.

    Raises:
        ValueError: names what is allowed.
    """
    if dtype not in ("auto", *DTYPES):
        raise ValueError(f"dtype {dtype!r}; allowed are auto, {', '.join(DTYPES)}")


def verify_checkpoint(folder: str | Path) -> dict[str, Any]:
    """Check a checkpoint's hashes, config, tensor names, shapes and types, and that its numbers are finite; one tensor at a time.

    Returns:
        Its manifest.

    Raises:
        ValueError: it is no checkpoint, or a part is missing, changed or does not fit; names it.
    """
    folder = Path(folder)
    if not folder.is_dir() or not is_checkpoint(folder):
        raise ValueError(f"{folder}: not the folder of a rosaq checkpoint")
    manifest = verify(folder)
    quantizer = RosaqQuantizer(RosaqConfig.of(folder))
    model = meta_model(AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False))
    quantizer.preprocess_model(model, checkpoint_files=[str(folder / name) for name in manifest["files"]])
    for name, tensor in SafetensorsFolder(folder).items():
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            raise ValueError(f"{folder}: tensor {name!r} holds NaN or Inf")
    return manifest


def load_model(
    model: str, device: str = "auto", dtype: str = "auto", cpu_dtype: torch.dtype = torch.float32, weights: str = "packed"
) -> tuple[Any, Any]:
    """A causal language model in evaluation mode, and its tokenizer.

    Args:
        model: a rosaq checkpoint (its hashes are checked), a Hugging Face folder, a `.gguf` file or a hub id.
        device: "auto", "cpu", "cuda" or "cuda:N".
        dtype: type to compute in; see `resolve_dtype`.
        cpu_dtype: what "auto" is on the CPU.
        weights: of a rosaq checkpoint: "packed", as they are stored; "dense", as plain layers of the same values, which
            is faster for evaluation and takes the memory of the unquantized model; "auto", dense where it fits twice
            into the free memory.

    Raises:
        ValueError: whatever keeps it from loading, naming the file or option.
    """
    if weights not in WEIGHTS:
        raise ValueError(f"weights {weights!r}; allowed are {', '.join(WEIGHTS)}")
    device = resolve_device(device)
    if Path(model).is_dir() and is_checkpoint(model):
        register()
        RosaqConfig.of(model)  # whose errors name the file
        verify(model)
        tokenizer = _given(read_tokenizer(Path(model)), model)
        config_dtype = resolve_dtype(dtype, torch.float16, cpu_dtype, device) if dtype != "auto" or device == "cpu" else "auto"
        loaded = AutoModelForCausalLM.from_pretrained(model, dtype=config_dtype, device_map=device, local_files_only=True, trust_remote_code=False)
        if weights == "dense" or (weights == "auto" and dense_fits(loaded, loaded.dtype)):
            return dense_model(loaded).eval(), tokenizer
        for module in loaded.modules():
            if isinstance(module, RosaqLinear):
                module.repack(loaded.dtype)  # now, so that the first token does not wait for it
        return loaded.eval(), tokenizer
    source = open_source(model)
    tokenizer = _given(source.tokenizer, model)
    return full_model(source, resolve_dtype(dtype, source.dtype, cpu_dtype, device), device), tokenizer


def _given(tokenizer: Any, model: str) -> Any:
    if tokenizer is None:
        raise ValueError(f"{model}: no tokenizer")
    return tokenizer
