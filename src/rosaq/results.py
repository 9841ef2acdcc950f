"""Where what is rounded goes: the form of every tensor of the checkpoint, and which parts of it are on disk already."""

from collections.abc import Mapping

import torch

from rosaq.architecture import LINEARS
from rosaq.plan import Plan, block_forms, table_forms
from rosaq.shard_files import Form, ShardFiles
from rosaq.source import Source
from rosaq.workfolder import WorkFolder, disk_errors

Parts = dict[str, dict[str, Form]]  # of the checkpoint: name of the part -> full name of a tensor -> its form


def checkpoint_parts(source: Source, plan: Plan) -> Parts:
    """The parts that a checkpoint is quantized in, each durable once it is done: the decoder blocks, then the tables.

    Raises:
        ValueError: a tensor of a block is missing or unknown, or some blocks have a bias that others have not; names it.
    """
    source.check_names()
    parts: Parts = {}
    for index in range(source.architecture.layers):
        prefix = source.architecture.block_prefix(index)
        names = [name.removeprefix(prefix) for name in source.block_names(index)]
        for role, module in LINEARS.items():
            if (f"{module}.bias" in names) != plan.blocks[index][role].bias:
                raise ValueError(f"{source.name}: {prefix}{module} and the first block's differ in whether they have a bias")
        forms = block_forms(plan, source.architecture, index, names, source.dtype)
        parts[block_part(index)] = {prefix + name: form for name, form in forms.items()}
    return parts | table_forms(plan, source.architecture, source.dtype)


def block_part(index: int) -> str:
    """Name of the part that is decoder block `index`."""
    return f"block.{index:05d}"


class Results:
    """Takes what is rounded part by part, and knows what an earlier run has left.

    Args:
        work: the run's folder, with a record of every part that is done.
        parts: of the checkpoint.
    """

    def __init__(self, work: WorkFolder, parts: Parts) -> None:
        """Lay the shards out; nothing is written yet."""
        self.parts, self._work = parts, work
        self.shards = ShardFiles(work.checkpoint, {name: form for forms in parts.values() for name, form in forms.items()})

    def create(self) -> None:
        """Make the shards, and take all of the disk space that they need.

        Raises:
            ValueError: there is not enough of it, or the destination cannot be written.
        """
        with disk_errors(self._work.destination):
            self.shards.create()

    def done(self, part: str) -> bool:
        """Whether a part is on disk, as it was written.

        Raises:
            ValueError: it has been changed since; names it.
        """
        record = self._work.noted(f"rounded-{part}")
        if record is None:
            return False
        with disk_errors(self._work.checkpoint):
            if self.shards.digest(self.parts[part]) != record.get("sha256"):
                raise ValueError(f"{self._work.checkpoint}: damaged: what is there of {part} is not what was written; --force starts over")
        return True

    def later(self, part: str, tensors: Mapping[str, torch.Tensor]) -> None:
        """Have a part written in the background; waits for the one before it."""
        if (known := self.parts[part].keys()) != tensors.keys():
            raise AssertionError(f"{part}: {sorted(known ^ tensors.keys())} are either planned or rounded, but not both")
        self._work.later(self._write, part, {name: tensor.cpu() for name, tensor in tensors.items()})

    def _write(self, part: str, tensors: Mapping[str, torch.Tensor]) -> None:
        with disk_errors(self._work.destination):
            digest = self.shards.write(tensors)
        self._work.note(f"rounded-{part}", {"sha256": digest})
