"""A rosaq checkpoint as an ordinary one, for engines that do not know the format.

"dense": every weight dequantized, FP16 as a rule, with what rotates at run time multiplied in. "compressed-tensors": the codes,
scales and zero points as they are, in the format "pack-quantized" of the library of that name (W4A16, asymmetric, per group),
which stock vLLM and transformers read. That format has one width for all channels of a layer and no gather, so only recipes
without salient channels fit into it.

Tensors are read from the file's map, changed and written one layer at a time.
"""

import copy
import math
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from rosaq.architecture import BLOCKS, HEAD
from rosaq.card import CHANNELS
from rosaq.checkpoint import MANIFEST, is_checkpoint, verify
from rosaq.checkpoint_writer import CheckpointWriter
from rosaq.clock import Progress, no_progress
from rosaq.engines.dense import dense_tensors
from rosaq.engines.loading import DTYPES
from rosaq.engines.transformers import register
from rosaq.layout import LinearLayout
from rosaq.linear import RosaqLinear
from rosaq.norm import RotatedNorm
from rosaq.packing import pack, pack_zeros, unpack, unpack_zeros

FORMATS = ("dense", "compressed-tensors")
GROUPS = (32, 64, 128)  # what engines' W4A16 kernels take
_REWRITTEN = ("config.json", MANIFEST, "README.md", CHANNELS, "model.safetensors.index.json")


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
    folder, kind = Path(checkpoint), DTYPES[dtype]
    if not folder.is_dir() or not is_checkpoint(folder):
        raise ValueError(f"{folder}: not the folder of a rosaq checkpoint")
    register()
    verify(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto", device_map="cpu", local_files_only=True, trust_remote_code=False)
    config, recipe = copy.deepcopy(model.config), model.config.quantization_config.recipe
    del config.quantization_config
    config.dtype = kind
    tensors = dense_tensors(model, kind)
    if form == "compressed-tensors":
        group = common_group(model)
        config.quantization_config = _compressed_config(group)
        tensors = _compressed(model, kind, group)
    tied, total = set(getattr(model, "all_tied_weights_keys", None) or {}), len(model.model.layers)
    with CheckpointWriter(output) as writer:
        for name, tensor in tensors:
            if name not in tied:
                writer.add({name: tensor})
            if name.startswith(f"{BLOCKS}."):
                progress("export", int(name.split(".")[2]) + 1, total)
        writer.finish(config, {"export": {"format": form, "dtype": dtype, "recipe": recipe}}, {}, [_Companions(folder)])


def _compressed(model: Any, dtype: torch.dtype, group: int) -> Iterator[tuple[str, torch.Tensor]]:
    for name, module in model.named_modules():
        if isinstance(module, RosaqLinear) and name != HEAD:
            for part, tensor in compressed_tensors(module.layout, module.tensors(), dtype, group).items():
                yield f"{name}.{part}", tensor
        elif not list(module.children()):
            for part, tensor in dense_tensors(module, dtype):
                yield name + part, tensor


def compressed_tensors(layout: LinearLayout, tensors: dict[str, torch.Tensor], dtype: torch.dtype, group: int) -> dict[str, torch.Tensor]:
    """A stored layer without salient channels as compressed-tensors has it; the same numbers, w = (code - zero) scale.

    Codes of fewer bits are put into 4, those of 2 bits times four. Scales and zero points are repeated where `group` divides the stored
    group size: a shorter last group is then a whole number of groups too.

    Returns:
        `weight_packed` (N, K / 8) and `weight_zero_point` (ceil(N / 8), K / group), int32 words of eight values of 4 bits, the
        first one lowest; `weight_scale` (N, K / group); `weight_shape` (2,); `bias` where there is one.
    """
    n, k = layout.out_features, layout.in_features
    first = torch.arange(0, k, group)  # first channel of each group of the result
    column = layout.column_groups()[first].to(tensors["scales"].device)
    zeros_NG = unpack_zeros(tensors["zeros"], layout.zero_bits, n)[:, column]
    return {
        "weight_packed": tensors["qweight"] if layout.bits == 4 else pack(layout.code_step * unpack(tensors["qweight"], layout.bits, k), 4),
        "weight_scale": tensors["scales"][:, column].to(dtype),
        "weight_zero_point": pack_zeros(zeros_NG, 4),
        "weight_shape": torch.tensor([n, k], dtype=torch.int64),
        **({"bias": tensors["bias"].to(dtype)} if layout.bias else {}),
    }


def common_group(model: Any) -> int:
    """The group size that all linear layers of a loaded checkpoint can be written with in compressed-tensors.

    Raises:
        ValueError: a module has what the format cannot hold; names it and says what.
    """
    group = 0
    for name, module in model.named_modules():
        if isinstance(module, RotatedNorm) or (isinstance(module, RosaqLinear) and type(module) is not RosaqLinear):
            raise ValueError(f"{name} rotates at run time, which compressed-tensors cannot say; export --format dense")
        if not isinstance(module, RosaqLinear) or name == HEAD:  # embedding and lm_head are written dense
            continue
        layout = module.layout
        if layout.salient:
            kept = f"{layout.blocks * layout.salient} salient channels at {layout.salient_bits} bits"
            raise ValueError(
                f"{name} keeps {kept}, and compressed-tensors has one width for all channels of a layer; "
                "export --format dense, or serve it through rosaq's plugin"
            )
        if layout.ordered:
            raise ValueError(f"{name} gathers its input before its groups, which W4A16 engines no longer do; export --format dense")
        group = math.gcd(group, layout.group_size, layout.block_size)
    fitting = [size for size in GROUPS if group % size == 0]
    if not fitting:
        raise ValueError(f"groups of {group} channels are all that the layers have in common, and W4A16 kernels take {GROUPS}; export --format dense")
    return fitting[-1]


def _compressed_config(group: int) -> dict[str, Any]:
    weights = {"num_bits": 4, "type": "int", "symmetric": False, "strategy": "group", "group_size": group, "dynamic": False, "actorder": None}
    scheme = {"targets": ["Linear"], "weights": weights, "input_activations": None, "output_activations": None}
    return {
        "quant_method": "compressed-tensors", "format": "pack-quantized", "quantization_status": "compressed", "ignore": [HEAD],
        "config_groups": {"group_0": scheme},
    }  # fmt: skip


@dataclass(frozen=True)
class _Companions:
    """What lies beside the weights and is taken along as it is: tokenizer, chat template, generation config."""

    folder: Path

    def save_pretrained(self, target: Path) -> None:
        """Copy the files."""
        for file in self.folder.iterdir():
            if file.is_file() and file.name not in _REWRITTEN and file.suffix != ".safetensors":
                shutil.copyfile(file, target / file.name)
