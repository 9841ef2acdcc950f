"""Names, shapes and types of the tensors that one quantized linear layer is stored as.

This file and `packing.py` are the checkpoint format; nothing else knows where a tensor lies. Shape letters:
N outputs, K inputs, B blocks of the input, S salient channels, Q quantized channels, G groups, W int32 words.

The K input channels form B equal blocks (one for most layers, one per attention head for the attention output).
The first `salient` channels of each block stay precise; the others are quantized in groups of `group_size`
consecutive channels that never cross a block. Where the group size does not divide what is left of a block, the
last group of the block is shorter. Head by head this is ROSAQ's W_O (arXiv:2506.13472, App. G); with B = 1 it is
the prefix of the rotated residual stream (Eq. 3).
"""

from dataclasses import asdict, dataclass
from itertools import accumulate
from typing import Any

import torch

BITS = (2, 3, 4, 8)
SALIENT_BITS = (8, 16)


def code_step(bits: int) -> int:
    """How many times the scale one step of a code is: 4 at 2 bits, whose zero points lie at quarters of a step, else 1.

    Among four levels it matters where zero is, and a zero point has 4 bits anyway: w = (4 code - zero) scale takes a sixth off the loss of whole
    zero points (docs/log.md).
    """
    return 4 if bits == 2 else 1


@dataclass(frozen=True)
class LinearLayout:
    """The form of one quantized linear layer y = x W^T + b, with W of N outputs and K inputs.

    Raises:
        ValueError: a size that no checkpoint can have, naming the value and what is allowed.
    """

    out_features: int
    in_features: int
    bits: int
    group_size: int
    blocks: int = 1
    salient: int = 0  # channels per block that stay precise, the first ones of the block
    salient_bits: int = 16
    bias: bool = False
    ordered: bool = False  # the input is permuted by an index tensor first (a gather at run time)

    def __post_init__(self) -> None:
        """Refuse what cannot be packed."""
        if self.bits not in BITS:
            raise ValueError(f"bits is {self.bits}; allowed are {BITS}")
        if self.salient_bits not in SALIENT_BITS:
            raise ValueError(f"salient_bits is {self.salient_bits}; allowed are {SALIENT_BITS}")
        if self.group_size < 1:
            raise ValueError(f"group_size is {self.group_size}; it must be positive")
        if self.blocks < 1 or self.in_features % self.blocks:
            raise ValueError(f"{self.in_features} input channels do not form {self.blocks} equal blocks")
        if not 0 <= self.salient < self.block_size:
            raise ValueError(f"{self.salient} salient channels of a block of {self.block_size}; at least one must be left to quantize")

    @property
    def block_size(self) -> int:
        """Input channels per block, K / B."""
        return self.in_features // self.blocks

    @property
    def quantized(self) -> int:
        """Quantized channels per block."""
        return self.block_size - self.salient

    @property
    def groups_per_block(self) -> int:
        """Groups per block, the shorter last one included."""
        return -(-self.quantized // self.group_size)

    @property
    def groups(self) -> int:
        """Groups of the whole layer, G."""
        return self.blocks * self.groups_per_block

    @property
    def zero_bits(self) -> int:
        """Bits a zero point is stored with: wide enough for every code, and a divisor of 32."""
        return 4 if self.bits <= 4 else 8

    @property
    def code_step(self) -> int:
        """How many times the scale one step of a code is."""
        return code_step(self.bits)

    def form(self) -> dict[str, Any]:
        """What a checkpoint's config says of the layer; its sizes and bias follow from the module it stands for."""
        return {key: value for key, value in asdict(self).items() if key not in ("out_features", "in_features", "bias")}

    def tensors(self) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        """Name of each stored tensor, with its shape and type.

        Codes run along the input channels of one output, quantized channels only, in order, `bits` each, the lowest
        bits of a word first, dense across words. Zero points of consecutive outputs share a word.
        """
        columns, n = self.blocks * self.quantized, self.out_features
        entries: dict[str, tuple[tuple[int, ...], torch.dtype]] = {
            "qweight": ((n, -(-columns * self.bits // 32)), torch.int32),
            "scales": ((n, self.groups), torch.float16),
            "zeros": ((-(-n * self.zero_bits // 32), self.groups), torch.int32),
        }
        if self.salient:
            precise = torch.float16 if self.salient_bits == 16 else torch.int8
            entries["salient"] = ((n, self.blocks * self.salient), precise)
            if self.salient_bits == 8:
                entries["salient_scales"] = ((n,), torch.float16)
        if self.ordered:
            entries["order"] = ((self.in_features,), torch.int32)
        if self.bias:
            entries["bias"] = ((n,), torch.float16)
        return entries

    def bits_stored(self) -> int:
        """Bits of all stored tensors but the bias, padding included."""
        total = 0
        for name, (shape, dtype) in self.tensors().items():
            if name != "bias":
                total += torch.Size(shape).numel() * dtype.itemsize * 8
        return total

    def salient_columns(self, device: torch.device | str = "cpu") -> torch.Tensor:
        """Positions (B S,) of the salient channels among the K (ordered) input channels, made on the device: a copy would have to wait for it."""
        within = torch.arange(self.salient, device=device)
        return (torch.arange(self.blocks, device=device)[:, None] * self.block_size + within).flatten()

    def quantized_columns(self, device: torch.device | str = "cpu") -> torch.Tensor:
        """Positions (B Q,) of the quantized channels among the K (ordered) input channels."""
        within = torch.arange(self.salient, self.block_size, device=device)
        return (torch.arange(self.blocks, device=device)[:, None] * self.block_size + within).flatten()

    def column_groups(self, device: torch.device | str = "cpu") -> torch.Tensor:
        """Group (B Q,) that each quantized channel belongs to."""
        within = torch.arange(self.quantized, device=device) // self.group_size
        return (torch.arange(self.blocks, device=device)[:, None] * self.groups_per_block + within).flatten()

    def group_slices(self) -> list[slice]:
        """Where each group lies among the quantized channels, in order."""
        lengths = [min(self.group_size, self.quantized - start) for start in range(0, self.quantized, self.group_size)] * self.blocks
        return [slice(stop - length, stop) for length, stop in zip(lengths, accumulate(lengths), strict=True)]
