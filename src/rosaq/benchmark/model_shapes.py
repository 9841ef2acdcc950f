"""Sizes of models by name, to time what does not depend on the values of weights."""

import copy
from pathlib import Path
from typing import Any

from transformers import AutoConfig

from rosaq.architecture import Architecture

_LLAMA = {"model_type": "llama", "rms_norm_eps": 1e-5, "tie_word_embeddings": False}
_LLAMA2 = {**_LLAMA, "vocab_size": 32000, "max_position_embeddings": 4096}


def _sizes(hidden: int, intermediate: int, layers: int, heads: int, kv_heads: int) -> dict[str, int]:
    names = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")
    return dict(zip(names, (hidden, intermediate, layers, heads, kv_heads), strict=True))


SHAPES: dict[str, dict[str, Any]] = {
    "llama-2-7b": {**_LLAMA2, **_sizes(4096, 11008, 32, 32, 32)},
    "llama-2-13b": {**_LLAMA2, **_sizes(5120, 13824, 40, 40, 40)},
    "llama-2-70b": {**_LLAMA2, **_sizes(8192, 28672, 80, 64, 8)},
    "llama-3-8b": {**_LLAMA, "vocab_size": 128256, "max_position_embeddings": 8192, **_sizes(4096, 14336, 32, 32, 8)},
    "qwen2-7b": {
        "model_type": "qwen2", "rms_norm_eps": 1e-6, "tie_word_embeddings": False, "vocab_size": 152064,
        "max_position_embeddings": 32768, **_sizes(3584, 18944, 28, 28, 4),
    },
    "smollm2-135m": {**_LLAMA, "vocab_size": 49152, "max_position_embeddings": 8192, **_sizes(576, 1536, 30, 9, 3)},
}  # fmt: skip


def shape_config(name: str) -> Any:
    """The unquantized transformers config of a named shape, or of a model folder.

    Raises:
        ValueError: neither a shape nor a folder with a config, or a family that is not known.
    """
    if name in SHAPES:
        values = dict(SHAPES[name])
        config = AutoConfig.for_model(values.pop("model_type"), **values)
    elif (Path(name) / "config.json").is_file():
        config = copy.deepcopy(AutoConfig.from_pretrained(name, local_files_only=True))
        if getattr(config, "quantization_config", None) is not None:
            del config.quantization_config
    else:
        raise ValueError(f"{name}: neither a model folder nor a known shape; shapes are {', '.join(SHAPES)}")
    config.architectures = [Architecture.of(config, name).family.causal_lm]
    return config
