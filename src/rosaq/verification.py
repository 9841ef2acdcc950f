"""How far a checkpoint's decoder blocks are from the original's: both run on the original's hidden states, block by block.

A rotated checkpoint has its residual stream in another basis R. It is found from the two embedding tables, E R ~ E',
as the orthogonal matrix nearest to E^T E' (Procrustes), so nothing but the two models is needed. A vocabulary smaller than
the width leaves some directions open: lm_head decides on them, and then the blocks' weights. Shape letters: S windows, T
tokens, V vocabulary, D hidden, N outputs.
"""

import itertools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig

from rosaq.architecture import EMBEDDING, HEAD, LINEARS, NORMS, SITE_NORM, SITES
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
ROWS = 1 << 14  # of a pair of weights that are turned into float64 at a time
UNDECIDED = 1e-9  # singular value, relative to the largest, up to which a pair of weights says nothing of a direction
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
    quantization = RosaqConfig.of(folder)
    check_version(quantization.format_version, folder)
    for name in ("model_type", "hidden_size", "num_hidden_layers", "vocab_size", "intermediate_size"):
        if getattr(config, name) != getattr(source.config, name):
            raise ValueError(f"{folder}: {name} is {getattr(config, name)}, but {source.name} has {getattr(source.config, name)}")
    if ids is None:
        ids = torch.randint(a.vocabulary, (WINDOWS, min(TOKENS, a.context)), generator=torch.Generator().manual_seed(SEED))
    weights, untied = _Weights(source, quantization, stored, device), not config.tie_word_embeddings
    embedding, table = weights.table(EMBEDDING)
    basis = torch.eye(a.hidden, device=device)
    if weights.rotated:
        basis = common_basis(itertools.chain([(embedding, table)], (weights.table(HEAD) for _ in range(untied)), weights.of_blocks()))
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
    if untied:
        head, table = weights.table(HEAD)
        errors.append(PartError("lm_head", _relative(table, head @ basis)))
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


@dataclass(frozen=True)
class _Weights:
    """What reads the residual stream (..., D), of the original and of a checkpoint: dense, float32, on the device."""

    source: Source
    quantization: RosaqConfig
    stored: SafetensorsFolder
    device: str

    @property
    def rotated(self) -> bool:
        """Whether the checkpoint's residual stream is in another basis."""
        return self.quantization.recipe["rotation"] not in OWN_BASIS

    def table(self, module: str) -> tuple[torch.Tensor, torch.Tensor]:
        """The embedding, or lm_head: (V, D)."""
        table = self.source.embedding().float() if module == EMBEDDING else self.source.head().float()
        if module == HEAD and self.rotated:  # whose final norm's weight is folded into it
            table = table * self.source.final_norm().float()
        a = self.source.architecture
        return table.to(self.device), self._dense(module, a.vocabulary, a.hidden)

    def of_blocks(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """The linear layers behind the norms of each block, the norms' weights included: (N, D)."""
        a = self.source.architecture
        for index, block in enumerate(self.source.blocks(range(a.layers), self.device)):
            for site, norm in SITE_NORM.items():
                gain = f"{NORMS[norm]}.weight"
                for role in SITES[site]:
                    weight = block[f"{LINEARS[role]}.weight"].float() * block[gain].float()
                    got = self._dense(f"{a.block_prefix(index)}{LINEARS[role]}", *a.shape(role))
                    yield weight, got * self.stored[f"{a.block_prefix(index)}{gain}"].float().to(self.device)

    def _dense(self, module: str, outputs: int, inputs: int) -> torch.Tensor:
        layout: LinearLayout | None = self.quantization.layout(module, (outputs, inputs), False)
        if layout is None:
            return self.stored[f"{module}.weight"].float().to(self.device)
        return dequantize(layout, {name: self.stored[f"{module}.{name}"].to(self.device) for name in layout.tensors()}, torch.float32)


def common_basis(pairs: Iterable[tuple[torch.Tensor, torch.Tensor]]) -> torch.Tensor:
    """The orthogonal R (D, D) with A R ~ A' for pairs of weights (N, D) of two models, float32.

    Each pair, by Procrustes, decides on those directions that the ones before it say nothing of: there is a second one only
    where the first has fewer rows than D.
    """
    left = right = basis = torch.empty(0)
    for number, (before, after) in enumerate(pairs):
        if not number:
            left = right = torch.eye(before.shape[1], dtype=torch.float64, device=before.device)
            basis = torch.zeros_like(left)
        parts = zip(before.split(ROWS), after.split(ROWS), strict=True)
        turned, values, back = torch.linalg.svd(sum((a.double() @ left).T @ (b.double() @ right) for a, b in parts))
        decided = int((values > UNDECIDED * values[0]).sum())
        left, right = left @ turned, right @ back.T
        basis += left[:, :decided] @ right[:, :decided].T
        left, right = left[:, decided:], right[:, decided:]
        if not left.shape[1]:
            break
    return (basis + left @ right.T).float()  # what nothing reads may be any


def _relative(got: torch.Tensor, wanted: torch.Tensor) -> float:
    return float((got - wanted).double().norm() / wanted.double().norm())
