"""A rosaq checkpoint as an ordinary one, for engines that do not know the format.

"dense": every weight dequantized, FP16 as a rule. "compressed-tensors": the codes, scales and zero points as they are, in the format
"pack-quantized" of the library of that name (W4A16, asymmetric, per group), which stock vLLM and transformers read. That
format has one width for all channels of a layer and no gather, so only recipes without salient channels fit into it.

Tensors are read, changed and written one layer at a time.
"""

import copy
import math
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig

from rosaq.architecture import EMBEDDING, HEAD
from rosaq.checkpoint import MANIFEST, CheckpointWriter, is_checkpoint, verify
from rosaq.clock import Progress, no_progress
from rosaq.engines.transformers import RosaqConfig
from rosaq.kernels.dequantized import dequantize
from rosaq.layout import LinearLayout
from rosaq.packing import pack, pack_zeros, unpack, unpack_zeros
from rosaq.skeleton import meta_model
from rosaq.source import SafetensorsFolder

FORMATS = ("dense", "compressed-tensors")
DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}
GROUPS = (32, 64, 128)  # what engines' W4A16 kernels take
_REWRITTEN = ("config.json", MANIFEST, "README.md", "model.safetensors.index.json")


def export(checkpoint: str | Path, output: str | Path, form: str = "dense", dtype: str = "float16", progress: Progress = no_progress) -> None:
    """Write a checkpoint in another format.

    Args:
        checkpoint: folder of a rosaq checkpoint; its hashes are checked.
        output: folder to make; it must not exist, or be empty. Nothing is left of it when writing fails.
        form: "dense" or "compressed-tensors".
        dtype: of dense weights, and of scales and everything that is not quantized: "float16", "bfloat16" or "float32".
        progress: called as (stage, done, total).

    Raises:
        ValueError: no rosaq checkpoint, an unknown format or type, or a recipe that the format cannot hold; says why.
    """
    if form not in FORMATS:
        raise ValueError(f"format {form!r}; allowed are {', '.join(FORMATS)}")
    if dtype not in DTYPES:
        raise ValueError(f"dtype {dtype!r}; allowed are {', '.join(DTYPES)}")
    opened = _Opened.of(Path(checkpoint))
    config = copy.deepcopy(opened.config)
    config.dtype = DTYPES[dtype]
    del config.quantization_config
    convert = dense_tensors
    if form == "compressed-tensors":
        group = common_group(opened.layouts)
        config.quantization_config = _compressed_config(group)
        convert = partial(compressed_tensors, group=group)
    with CheckpointWriter(output) as writer:
        for done, (module, tensors) in enumerate(opened.modules()):
            layout = opened.layouts.get(module)
            if layout is None:
                tensors = {name: tensor.to(DTYPES[dtype]) for name, tensor in tensors.items()}
            else:
                change = dense_tensors if module in (EMBEDDING, HEAD) else convert
                tensors = change(layout, tensors, DTYPES[dtype])
            writer.add({f"{module}.{name}": tensor for name, tensor in tensors.items()})
            progress("export", done + 1, opened.count)
        made = {"export": {"format": form, "dtype": dtype, "recipe": opened.recipe}}
        writer.finish(config, made, {}, [_Companions(Path(checkpoint))])


def dense_tensors(layout: LinearLayout, tensors: dict[str, torch.Tensor], dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """`weight` (N, K), and `bias` (N,) where there is one, of a stored layer; columns in the order of the layer's own input."""
    bias = {"bias": tensors["bias"].to(dtype)} if layout.bias else {}
    return {"weight": dequantize(layout, tensors, torch.float32).to(dtype), **bias}


def compressed_tensors(layout: LinearLayout, tensors: dict[str, torch.Tensor], dtype: torch.dtype, group: int) -> dict[str, torch.Tensor]:
    """A stored layer without salient channels as compressed-tensors has it; the same numbers, w = (code - zero) scale.

    Codes of fewer bits are put into 4. Scales and zero points are repeated where `group` divides the stored group size: a shorter
    last group is then a whole number of groups too.

    Returns:
        `weight_packed` (N, K / 8) and `weight_zero_point` (ceil(N / 8), K / group), int32 words of eight values of 4 bits, the
        first one lowest; `weight_scale` (N, K / group); `weight_shape` (2,); `bias` where there is one.
    """
    n, k = layout.out_features, layout.in_features
    first = torch.arange(0, k, group)  # first channel of each group of the result
    column = layout.column_groups()[first].to(tensors["scales"].device)
    zeros_NG = unpack_zeros(tensors["zeros"], layout.zero_bits, n)[:, column]
    return {
        "weight_packed": tensors["qweight"] if layout.bits == 4 else pack(unpack(tensors["qweight"], layout.bits, k), 4),
        "weight_scale": tensors["scales"][:, column].to(dtype),
        "weight_zero_point": pack_zeros(zeros_NG, 4),
        "weight_shape": torch.tensor([n, k], dtype=torch.int64),
        **({"bias": tensors["bias"].to(dtype)} if layout.bias else {}),
    }


def common_group(layouts: dict[str, LinearLayout]) -> int:
    """The group size that all linear layers can be written with in compressed-tensors.

    Raises:
        ValueError: a layer has what the format cannot hold; names the layer and says what.
    """
    group = 0
    for module, layout in layouts.items():
        if module in (EMBEDDING, HEAD):
            continue  # written dense
        if layout.salient:
            kept = f"{layout.blocks * layout.salient} salient channels at {layout.salient_bits} bits"
            raise ValueError(
                f"{module} keeps {kept}, and compressed-tensors has one width for all channels of a layer; "
                "export --format dense, or serve it through rosaq's plugin"
            )
        if layout.ordered:
            raise ValueError(f"{module} gathers its input before its groups, which W4A16 engines no longer do; export --format dense")
        group = math.gcd(group, layout.group_size, layout.block_size)
    if group not in GROUPS:
        group = next((size for size in reversed(GROUPS) if group % size == 0), group)
    if group not in GROUPS:
        raise ValueError(f"groups of {group} channels are all that the layers have in common, and W4A16 kernels take {GROUPS}; export --format dense")
    return group


def _compressed_config(group: int) -> dict[str, Any]:
    weights = {"num_bits": 4, "type": "int", "symmetric": False, "strategy": "group", "group_size": group, "dynamic": False, "actorder": None}
    scheme = {"targets": ["Linear"], "weights": weights, "input_activations": None, "output_activations": None}
    return {
        "quant_method": "compressed-tensors", "format": "pack-quantized", "quantization_status": "compressed", "ignore": [HEAD],
        "config_groups": {"group_0": scheme},
    }  # fmt: skip


@dataclass(frozen=True)
class _Opened:
    """A checkpoint to read: its config, the form of each quantized module, its tensors, and how many modules have some."""

    config: Any
    recipe: dict[str, Any]
    layouts: dict[str, LinearLayout]
    tensors: SafetensorsFolder
    count: int

    @classmethod
    def of(cls, folder: Path) -> "_Opened":
        if not folder.is_dir() or not is_checkpoint(folder):
            raise ValueError(f"{folder}: not the folder of a rosaq checkpoint")
        verify(folder)
        config = AutoConfig.from_pretrained(folder, local_files_only=True)
        quantized = RosaqConfig.from_dict(config.quantization_config)
        if quantized.rotated_norms:
            name = quantized.recipe["name"]
            raise ValueError(f"recipe {name!r} rotates after each norm at run time, which no ordinary checkpoint can say; load it with transformers")
        layouts = {}
        for name, module in meta_model(config).named_modules():
            if isinstance(module, torch.nn.Linear | torch.nn.Embedding):
                layout = quantized.layout(name, tuple(module.weight.shape), getattr(module, "bias", None) is not None)
                if layout is not None:
                    layouts[name] = layout
        tensors = SafetensorsFolder(folder)
        return cls(config, quantized.recipe, layouts, tensors, len({name.rpartition(".")[0] for name in tensors}))

    def modules(self) -> Iterator[tuple[str, dict[str, torch.Tensor]]]:
        """Each module that has tensors, with these by their last name."""
        names: dict[str, list[str]] = {}
        for name in self.tensors:
            module, _, leaf = name.rpartition(".")
            names.setdefault(module, []).append(leaf)
        for module, leaves in names.items():
            yield module, {leaf: self.tensors[f"{module}.{leaf}"] for leaf in leaves}


@dataclass(frozen=True)
class _Companions:
    """What lies beside the weights and is taken along as it is: tokenizer, chat template, generation config."""

    folder: Path

    def save_pretrained(self, target: Path) -> None:
        """Copy the files."""
        for file in self.folder.iterdir():
            if file.is_file() and file.name not in _REWRITTEN and file.suffix != ".safetensors":
                shutil.copyfile(file, target / file.name)
