"""How far a checkpoint's decoder blocks are from the original's: both run on the original's hidden states, block by block.

A rotated checkpoint has its residual stream in another basis R. It is found from the two embedding tables, E R ~ E',
as the orthogonal matrix nearest to E^T E' (Procrustes), so nothing but the two models is needed. Shape letters:
S windows, T tokens, V vocabulary, D hidden.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig

from rosaq.architecture import EMBEDDING, HEAD
from rosaq.checkpoint import check_version
from rosaq.clock import Progress, no_progress
from rosaq.engines.transformers import RosaqConfig, RosaqQuantizer
from rosaq.kernels.dequantized import dequantize
from rosaq.layout import LinearLayout
from rosaq.safetensors_folder import SafetensorsFolder
from rosaq.skeleton import BlockRunner
from rosaq.source import Source

WINDOWS, TOKENS, SEED = 4, 128, 0  # of token ids drawn at random, where none are given
WRONG = 1.0  # relative error from which a part says nothing of the original
OWN_BASIS = ("none", "per-layer")  # rotations that leave the residual stream as it is


@dataclass(frozen=True)
class PartError:
    """How far one part of a checkpoint is from the original's.

    Attributes:
        part: "embedding", "block N" or "lm_head".
        relative_error: ||y' - y|| / ||y|| (Frobenius) of what the part adds to the residual stream (tables: of its weight).
    """

    part: str
    relative_error: float


@torch.inference_mode()
def part_errors(folder: Path, source: Source, device: str, progress: Progress = no_progress, ids: torch.Tensor | None = None) -> list[PartError]:
    """Errors of embedding, every decoder block and lm_head against the original.

    Args:
        folder: of a checkpoint that `verify_checkpoint` finds whole.
        source: the original.
        device: where to run.
        progress: called as ("blocks", done, total).
        ids: token ids (S, T) to run on; by default drawn at random with a fixed seed.

    Raises:
        ValueError: another architecture, or a part whose error is not finite or at least 1; names it.
    """
    config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    a, stored = source.architecture, SafetensorsFolder(folder)
    quantization = RosaqConfig.from_dict(config.quantization_config)
    check_version(quantization.format_version, folder)
    for name in ("model_type", "hidden_size", "num_hidden_layers", "vocab_size", "intermediate_size"):
        if getattr(config, name) != getattr(source.config, name):
            raise ValueError(f"{folder}: {name} is {getattr(config, name)}, but {source.name} has {getattr(source.config, name)}")
    if ids is None:
        ids = torch.randint(a.vocabulary, (WINDOWS, min(TOKENS, a.context)), generator=torch.Generator().manual_seed(SEED))
    embedding, table = source.embedding().float().to(device), _table(EMBEDDING, quantization, stored, a.vocabulary, a.hidden).to(device)
    basis, rotated = torch.eye(a.hidden, device=device), quantization.recipe["rotation"] not in OWN_BASIS
    if rotated:
        left, _, right = torch.linalg.svd((embedding.T @ table).double())
        basis = (left @ right).float()
    errors = [PartError("embedding", _relative(table, embedding @ basis))]
    states = torch.nn.functional.embedding(ids.to(device), embedding)
    original, packed = BlockRunner(source.config, ids.shape[1], torch.float32, device), _packed_runner(config, quantization, ids.shape[1], device)
    for index, block in enumerate(source.blocks(range(a.layers), device)):
        original.load(index, {name: tensor.float() for name, tensor in block.items()})
        prefix = a.block_prefix(index)
        packed.load(index, {name.removeprefix(prefix): _loadable(stored[name]).to(device) for name in stored if name.startswith(prefix)})
        after = original.run(index, states)
        errors.append(PartError(f"block {index}", _relative((packed.run(index, states @ basis) - states @ basis) @ basis.T, after - states)))
        original.release(index)
        packed.release(index)
        states = after
        progress("blocks", index + 1, a.layers)
    if not config.tie_word_embeddings:
        gain = source.final_norm().float().to(device) if rotated else 1  # a rotated model's is folded into lm_head
        head = _table(HEAD, quantization, stored, a.vocabulary, a.hidden).to(device)
        errors.append(PartError("lm_head", _relative(head, (source.head().float().to(device) * gain) @ basis)))
    for error in errors:
        if not error.relative_error < WRONG:
            raise ValueError(f"{folder}: {error.part} is no quantized form of {source.name}'s: relative error {error.relative_error:.3g}")
    return errors


def _packed_runner(config: Any, quantization: RosaqConfig, tokens: int, device: str) -> BlockRunner:
    quantizer = RosaqQuantizer(quantization)
    return BlockRunner(config, tokens, torch.float32, device, lambda model: quantizer.preprocess_model(model))


def _loadable(tensor: torch.Tensor) -> torch.Tensor:
    """A stored tensor as a block in float32 takes it: bfloat16 norms as float32, the format's own types as they are."""
    return tensor.float() if tensor.dtype == torch.bfloat16 else tensor


def _table(module: str, quantization: RosaqConfig, stored: SafetensorsFolder, vocabulary: int, hidden: int) -> torch.Tensor:
    """An embedding or lm_head of a checkpoint as a dense weight (V, D), float32."""
    layout: LinearLayout | None = quantization.layout(module, (vocabulary, hidden), False)
    if layout is None:
        return stored[f"{module}.weight"].float()
    return dequantize(layout, {name: stored[f"{module}.{name}"] for name in layout.tensors()}, torch.float32)


def _relative(got: torch.Tensor, wanted: torch.Tensor) -> float:
    return float((got - wanted).double().norm() / wanted.double().norm())
