"""`RosaqEmbedding`: an embedding table stored as integer codes per group, dequantized row by row when looked up."""

from collections.abc import Callable

import torch

from rosaq.layout import LinearLayout
from rosaq.packing import unpack


class RosaqEmbedding(torch.nn.Module):
    """Embedding of token ids, with the tensors of `LinearLayout.tensors` (one output per token of the vocabulary).

    Args:
        layout: form of the table, (vocabulary, hidden), without salient channels.
        dtype: type of the embeddings that come out.
        device: where the buffers are made.
    """

    def __init__(self, layout: LinearLayout, dtype: torch.dtype, device: torch.device | str | None = None) -> None:
        """Make uninitialised buffers."""
        super().__init__()
        assert not layout.salient and layout.blocks == 1
        self.layout, self.dtype = layout, dtype
        self.num_embeddings, self.embedding_dim = layout.out_features, layout.in_features
        for name, (shape, kind) in layout.tensors().items():
            self.register_buffer(name, torch.empty(shape, dtype=kind, device=device))

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """Embeddings (..., hidden) of token ids (...), in `dtype`."""
        flat, form = ids.reshape(-1), self.layout
        codes = form.code_step * unpack(self.get_buffer("qweight")[flat], form.bits, form.in_features)
        scales = self.get_buffer("scales")[flat].float()
        per_word = 32 // form.zero_bits  # zero points of consecutive rows share a word
        shifts = (flat % per_word * form.zero_bits).to(torch.int32)[:, None]
        zeros = (self.get_buffer("zeros")[flat // per_word] >> shifts) & ((1 << form.zero_bits) - 1)
        lengths = [form.group_size] * (form.groups - 1) + [form.quantized - (form.groups - 1) * form.group_size]
        parts = codes.split(lengths, dim=1)
        rows = [(part - zeros[:, g : g + 1]) * scales[:, g : g + 1] for g, part in enumerate(parts)]
        return torch.cat(rows, dim=1).to(self.dtype).view(*ids.shape, form.in_features)

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> "RosaqEmbedding":
        """Move the buffers but keep their types; a change of floating type changes what comes out."""
        probe = fn(torch.empty(0, dtype=self.dtype, device=self.get_buffer("scales").device))
        self.dtype = probe.dtype

        def move(tensor: torch.Tensor) -> torch.Tensor:
            moved = fn(tensor)
            return moved if moved.dtype == tensor.dtype else tensor.to(moved.device)

        return super()._apply(move, recurse)

    def extra_repr(self) -> str:
        """One line for `print(model)`."""
        return f"{self.num_embeddings}, {self.embedding_dim}, bits={self.layout.bits}, group_size={self.layout.group_size}"
