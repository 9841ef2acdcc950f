"""The tensors of a GGUF file under their Hugging Face names, dequantized one at a time.

llama.cpp interleaves the two halves of each rotary head in the rows of q and k of its "llama" architecture (which
Mistral models use too); they are put back here. Reading uses the package gguf; nothing is held but the file's map.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
import torch

from rosaq.architecture import EMBEDDING, FINAL_NORM, HEAD, LINEARS, NORMS

_BLOCK_NAMES = {
    "attn_q": LINEARS["q"],
    "attn_k": LINEARS["k"],
    "attn_v": LINEARS["v"],
    "attn_output": LINEARS["o"],
    "ffn_gate": LINEARS["gate"],
    "ffn_up": LINEARS["up"],
    "ffn_down": LINEARS["down"],
    "attn_norm": NORMS["attn_norm"],
    "ffn_norm": NORMS["mlp_norm"],
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
}
_MODEL_NAMES = {"token_embd": EMBEDDING, "output_norm": FINAL_NORM, "output": HEAD}
_ROTARY_TABLE = "rope_freqs.weight"  # Llama 3.x: what config.json's rope parameters say already


class GgufTensors(Mapping[str, torch.Tensor]):
    """Tensors of one GGUF file by Hugging Face name, float32, read and dequantized when asked for.

    Attributes:
        fields: what the file states of the model in general, by name, such as "general.license".
    """

    def __init__(self, path: Path, heads: int, kv_heads: int) -> None:
        """Index the file.

        Args:
            path: the file.
            heads: query heads, by which the rows of q are interleaved.
            kv_heads: key-value heads, likewise for k.

        Raises:
            ValueError: the file is no GGUF, is truncated, or holds a tensor that has no place; names it.
        """
        import gguf  # noqa: PLC0415  (an optional dependency)

        try:
            reader = gguf.GGUFReader(path)
        except Exception as error:  # of many kinds, by where the file is cut or corrupt
            raise ValueError(f"{path}: not a readable GGUF file (truncated or corrupt): {error}") from error
        architecture = reader.fields["general.architecture"]
        interleaved = bytes(architecture.parts[architecture.data[0]]).decode() == "llama"
        self.fields = {name: field.contents() for name, field in reader.fields.items() if name.startswith("general.")}
        self._dequantize = gguf.dequantize
        self._path, self._tensors = path, {}
        self._heads = {LINEARS["q"]: heads, LINEARS["k"]: kv_heads} if interleaved else {}
        for tensor in reader.tensors:
            if tensor.name != _ROTARY_TABLE:
                self._tensors[self._hugging_face_name(tensor.name)] = tensor

    def _hugging_face_name(self, name: str) -> str:
        stem, _, suffix = name.rpartition(".")
        if stem in _MODEL_NAMES:
            return f"{_MODEL_NAMES[stem]}.{suffix}"
        parts = stem.split(".")
        if len(parts) == 3 and parts[0] == "blk" and parts[2] in _BLOCK_NAMES:
            return f"model.layers.{parts[1]}.{_BLOCK_NAMES[parts[2]]}.{suffix}"
        raise ValueError(f"{self._path}: tensor {name!r} has no place in a supported architecture")

    def __getitem__(self, name: str) -> torch.Tensor:
        """Read and dequantize one tensor.

        Raises:
            ValueError: it is of a type that the package gguf does not dequantize; names both.
        """
        tensor = self._tensors[name]
        try:
            values = np.asarray(self._dequantize(tensor.data, tensor.tensor_type), dtype=np.float32)
        except NotImplementedError as error:
            raise ValueError(
                f"{self._path}: tensor {tensor.name!r} is of type {tensor.tensor_type.name}, which the package gguf cannot read"
            ) from error
        module = name.split(".", 3)[-1].rpartition(".")[0]
        if module in self._heads:
            halves = values.reshape(self._heads[module], -1, 2, *values.shape[1:])
            values = halves.swapaxes(1, 2).reshape(values.shape)
        return torch.from_numpy(np.array(values))  # a copy: the file's map is read-only

    def __contains__(self, name: object) -> bool:
        """Whether there is such a tensor, without reading it."""
        return name in self._tensors

    def __iter__(self) -> Iterator[str]:
        """Names of all tensors."""
        return iter(self._tensors)

    def __len__(self) -> int:
        """Number of tensors."""
        return len(self._tensors)
