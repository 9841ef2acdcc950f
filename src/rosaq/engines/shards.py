"""What one rank of an engine holds of a stored layer: its tensors cut as they are read, and several layers joined into one.

An engine that serves over several devices cuts some layers by outputs and others by inputs, and computes layers that share
their input (q, k, v; gate, up) as one. Both are done on the stored tensors, so that the result is a stored layer again.
Zero points of several outputs share a word, which a cut need not respect: they are unpacked and packed again.

Shape letters as in `layout.py`: N outputs, K inputs, B blocks, S salient channels, Q quantized channels, G groups.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch

from rosaq.layout import LinearLayout
from rosaq.packing import pack, pack_zeros, unpack, unpack_zeros


@dataclass
class Shard:
    """One rank's share of one stored layer; it fills as tensors are taken.

    Attributes:
        module: name of the layer in the checkpoint.
        stored: form of the whole layer, without its bias.
        outputs: outputs that this rank computes.
        rows: outputs of the share: `len(outputs)`, or more where the engine pads it; the padding computes 0.
        part: which part of the inputs this rank has, from 0.
        parts: how many equal parts the inputs are cut into.
    """

    module: str
    stored: LinearLayout
    outputs: range
    rows: int
    part: int = 0
    parts: int = 1
    tensors: dict[str, torch.Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Refuse a cut that would go through a group or a head."""
        assert len(self.outputs) <= self.rows and self.outputs.step == 1
        allowed = input_parts(self.stored)
        if self.parts not in allowed:
            what = f"{self.stored.blocks} heads" if self.stored.blocks > 1 else f"{self.stored.in_features} inputs"
            raise ValueError(
                f"{self.module}: its {what} in groups of {self.stored.group_size} cannot be cut into {self.parts} parts; "
                f"tensor parallel sizes that divide it are {', '.join(map(str, allowed))}"
            )

    @property
    def layout(self) -> LinearLayout:
        """Form of the share."""
        form = self.stored
        blocks = form.blocks // self.parts if form.blocks > 1 else 1
        salient = form.salient if form.blocks > 1 or self.part == 0 else 0
        return replace(form, out_features=self.rows, in_features=form.in_features // self.parts, blocks=blocks, salient=salient)

    def take(self, name: str, tensor: torch.Tensor, device: torch.device) -> None:
        """Keep this rank's share of a stored tensor, in memory of its own on `device`.

        Raises:
            ValueError: the layer has no such tensor, or it has another shape or type; names it.
        """
        form = self.stored.tensors().get(name)
        if form is None:
            raise ValueError(f"tensor '{self.module}.{name}' is unknown to this model")
        shape, dtype = form
        if tuple(tensor.shape) != shape or tensor.dtype != dtype:
            found = f"shape {tuple(tensor.shape)} and type {tensor.dtype}"
            raise ValueError(f"tensor '{self.module}.{name}' has {found}; the format asks for {shape} and {dtype}")
        if name in self.layout.tensors():
            self.tensors[name] = self._cut_outputs(name, self._cut_inputs(name, tensor)).to(device, copy=True)

    def check_complete(self) -> None:
        """Refuse a share of which a tensor never came: engines do not notice.

        Raises:
            ValueError: names the first missing tensor.
        """
        for name in self.layout.tensors():
            if name not in self.tensors:
                raise ValueError(f"tensor '{self.module}.{name}' is missing from the checkpoint")

    def _cut_inputs(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        if self.parts == 1:
            return tensor
        form, mine = self.stored, self.layout
        if name == "salient":  # of every block, or all of them on the first rank
            columns = mine.blocks * mine.salient
            return tensor[:, self.part * columns : (self.part + 1) * columns]
        start = self.part * mine.blocks * mine.quantized if form.blocks > 1 else max(0, self.part * mine.in_features - form.salient)
        if name in ("scales", "zeros"):
            first = self.part * mine.groups if form.blocks > 1 else start // form.group_size
            return tensor[:, first : first + mine.groups]
        if name != "qweight":
            return tensor
        length = mine.blocks * mine.quantized
        if start * form.bits % 32 == 0 and length * form.bits % 32 == 0:  # whole words, as good as always
            return tensor[:, start * form.bits // 32 : (start + length) * form.bits // 32]
        return pack(unpack(tensor, form.bits, form.blocks * form.quantized)[:, start : start + length], form.bits)

    def _cut_outputs(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        n = self.stored.out_features
        if name == "order" or (self.outputs == range(n) and self.rows == n):
            return tensor
        if name == "zeros":
            return pack_zeros(self._rows(unpack_zeros(tensor, self.stored.zero_bits, n)), self.stored.zero_bits)
        return self._rows(tensor)

    def _rows(self, tensor: torch.Tensor) -> torch.Tensor:
        mine = tensor[self.outputs.start : self.outputs.stop]
        padding = [0, 0] * (tensor.dim() - 1) + [0, self.rows - len(mine)]
        return torch.nn.functional.pad(mine, padding)


def input_parts(layout: LinearLayout) -> list[int]:
    """Numbers of equal parts that a layer's inputs can be cut into: at whole heads where it has blocks, else between groups.

    Salient channels that are the first ones of all inputs go to the first part.
    """
    if layout.ordered:
        return [1]
    if layout.blocks > 1:
        return [parts for parts in range(1, layout.blocks + 1) if layout.blocks % parts == 0]
    found = [1]
    for parts in range(2, layout.in_features // layout.group_size + 1):
        width, rest = divmod(layout.in_features, parts)
        if not rest and width > layout.salient and all((cut * width - layout.salient) % layout.group_size == 0 for cut in range(1, parts)):
            found.append(parts)
    return found


def join(shards: Sequence[Shard]) -> tuple[LinearLayout, dict[str, torch.Tensor]]:
    """One layer that computes the outputs of several, one after the other, from the same input.

    Args:
        shards: complete shares of layers of one form.

    Returns:
        Form and stored tensors of the joined layer. The tensors are taken out of the shards, so that nothing is kept twice.

    Raises:
        ValueError: a tensor is missing, or the layers gather their inputs in different orders; names the layer.
    """
    for shard in shards:
        shard.check_complete()
    first = shards[0]
    layout = replace(first.layout, out_features=sum(shard.rows for shard in shards))
    joined = {}
    for name in layout.tensors():
        parts = [shard.tensors.pop(name) for shard in shards]
        if len(parts) == 1:
            joined[name] = parts[0]
        elif name == "order":
            for shard, part in zip(shards, parts, strict=True):
                if not torch.equal(part, parts[0]):
                    raise ValueError(f"{shard.module} and {first.module} gather their inputs in different orders and cannot be joined")
            joined[name] = parts[0]
        elif name == "zeros":
            zeros = [unpack_zeros(part, layout.zero_bits, shard.rows) for shard, part in zip(shards, parts, strict=True)]
            joined[name] = pack_zeros(torch.cat(zeros), layout.zero_bits)
        else:
            joined[name] = torch.cat(parts)
    return layout, joined
