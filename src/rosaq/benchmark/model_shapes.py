"""Sizes of models by name, and the type of their published weights, to time what does not depend on the values of weights."""

import copy
from pathlib import Path
from typing import Any

from transformers import AutoConfig

from rosaq.architecture import Architecture

_LLAMA = {"model_type": "llama", "rms_norm_eps": 1e-5, "tie_word_embeddings": False}
_LLAMA2 = {**_LLAMA, "vocab_size": 32000, "max_position_embeddings": 4096, "dtype": "float16"}
_LLAMA3 = {**_LLAMA, "vocab_size": 128256, "max_position_embeddings": 8192, "dtype": "bfloat16"}


def _sizes(hidden: int, intermediate: int, layers: int, heads: int, kv_heads: int) -> dict[str, int]:
    names = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")
    return dict(zip(names, (hidden, intermediate, layers, heads, kv_heads), strict=True))


SHAPES: dict[str, dict[str, Any]] = {
    "llama-2-7b": {**_LLAMA2, **_sizes(4096, 11008, 32, 32, 32)},
    "llama-2-13b": {**_LLAMA2, **_sizes(5120, 13824, 40, 40, 40)},
    "llama-2-70b": {**_LLAMA2, **_sizes(8192, 28672, 80, 64, 8)},
    "llama-3-8b": {**_LLAMA3, **_sizes(4096, 14336, 32, 32, 8)},
    "llama-3-70b": {**_LLAMA3, **_sizes(8192, 28672, 80, 64, 8)},
    "qwen2-7b": {
        "model_type": "qwen2", "rms_norm_eps": 1e-6, "tie_word_embeddings": False, "vocab_size": 152064,
        "max_position_embeddings": 32768, "dtype": "bfloat16", **_sizes(3584, 18944, 28, 28, 4),
    },
    "smollm2-135m": {**_LLAMA, "vocab_size": 49152, "max_position_embeddings": 8192, "dtype": "bfloat16", **_sizes(576, 1536, 30, 9, 3)},
}  # fmt: skip
TINY = {**_LLAMA, "vocab_size": 500, "max_position_embeddings": 2048, "dtype": "float16", **_sizes(64, 176, 4, 4, 2)}  # to try a benchmark out


def named_config(name: str, layers: int | None = None) -> Any:
    """The unquantized transformers config of one of `SHAPES`, or of "tiny", with all of its decoder blocks or so many."""
    values = dict(TINY if name == "tiny" else SHAPES[name])
    if layers is not None:
        values["num_hidden_layers"] = layers
    config = AutoConfig.for_model(values.pop("model_type"), **values)
    config.architectures = [Architecture.of(config, name).family.causal_lm]
    return config


def shape_config(name: str) -> Any:
    """The unquantized transformers config of a named shape, or of a model folder.

    Raises:
        ValueError: neither a shape nor a folder with a config, or a family that is not known.
    """
    if name in SHAPES:
        return named_config(name)
    if not (Path(name) / "config.json").is_file():
        raise ValueError(f"{name}: neither a model folder nor a known shape; shapes are {', '.join(SHAPES)}")
    config = copy.deepcopy(AutoConfig.from_pretrained(name, local_files_only=True, trust_remote_code=False))
    if getattr(config, "quantization_config", None) is not None:
        del config.quantization_config
    config.architectures = [Architecture.of(config, name).family.causal_lm]
    return config
