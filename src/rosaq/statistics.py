"""What calibration leaves: the sites' inputs, which any number of recipes can share, and where they came from."""

import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, overload

import torch

from rosaq.architecture import SITES
from rosaq.basis import ResidualSum, kept_inputs, residual_moment
from rosaq.calibration import Calibration, read_documents, sample_windows, token_windows, windows_hash
from rosaq.clock import Clock, Progress, no_progress
from rosaq.device import resolve_device
from rosaq.distributed import Ranks, current_ranks
from rosaq.memory import Work, estimate, place_activations
from rosaq.moments import BATCH_TOKENS, BlockInputs, Flow, SiteInputs, collect, collect_moments, own_windows
from rosaq.recipe import Recipe
from rosaq.skeleton import full_model
from rosaq.source import Source
from rosaq.workfolder import WorkFolder

SNAPSHOT_BLOCKS = 8  # blocks between two records of the residual stream's sum, which is large


@dataclass
class Statistics:
    """Inputs of every site of a model over its calibration windows.

    Attributes:
        record: the calibration's settings, sizes, and a SHA-256 of its tokens, JSON-able.
        inputs: per decoder block.
        windows: token ids (S, T).
        residual: moment (D, D) of the residual stream where it was summed up block by block, because the inputs lack theirs.
        learned: rotations learned from the windows (`learned.Learned`), by what they depend on; filled by `quantize`.
        weights: what an error counts at each token (`sensitivity.token_weights`), where a recipe has asked for it; filled by `quantize`.
        options: forms that sites may get and what they lose (`allocation.Option`), by recipe without its target; filled by `quantize`.
        hold: keep the whole second moments that recipes have asked for; see `moments_fit`.
    """

    record: dict[str, Any]
    inputs: Sequence[BlockInputs]
    windows: torch.Tensor
    residual: torch.Tensor | None = None
    learned: dict[tuple[Any, ...], Any] = field(default_factory=dict)
    weights: list[dict[str, torch.Tensor]] | None = None
    options: dict[Recipe, Any] = field(default_factory=dict)
    hold: bool = False
    _held: dict[tuple[int, bool], list[dict[str, torch.Tensor]]] = field(default_factory=dict, repr=False)

    def tensors(self) -> dict[str, torch.Tensor]:
        """The record, the inputs and the windows as tensors by name, to be kept in a file."""
        found = {"windows": self.windows.contiguous(), "record": torch.tensor(list(json.dumps(self.record).encode()), dtype=torch.uint8)}
        for index, block in enumerate(self.inputs):
            for site, kept in block.items():
                found |= {f"{index}.{site}.{part}": tensor.contiguous() for part, tensor in vars(kept).items() if tensor is not None}
        return found

    @classmethod
    def from_tensors(cls, tensors: dict[str, torch.Tensor]) -> "Statistics":
        """What `tensors` gave."""
        inputs: dict[int, dict[str, dict[str, torch.Tensor]]] = {}
        for name, tensor in tensors.items():
            if name not in ("windows", "record"):
                index, site, part = name.split(".")
                inputs.setdefault(int(index), {}).setdefault(site, {})[part] = tensor
        blocks = [{site: SiteInputs(**inputs[index][site]) for site in SITES} for index in sorted(inputs)]
        return cls(json.loads(bytes(tensors["record"].tolist())), blocks, tensors["windows"])

    def residual_moment(self) -> torch.Tensor:
        """The moment (D, D) that one basis for the whole residual stream is taken from (`basis.ResidualSum`)."""
        return residual_moment(self.inputs) if self.residual is None else self.residual

    def second_moments(self, source: Source, device: str, flow: Flow | None = None) -> Iterator[dict[str, torch.Tensor]]:
        """Whole second moments of each block's sites on the device, from block `flow.start` on, as `collect_moments` gives them.

        A pass over the text, unless they are held.
        """
        flow = flow or Flow()
        kind = flow.sink_weight, flow.weights is not None
        if kind in self._held:
            yield from ({site: moment.to(device) for site, moment in moments.items()} for moments in self._held[kind][flow.start :])
            return
        if flow.start == source.architecture.layers:
            return
        held, hold = [], self.hold and not flow.start
        for moments in collect_moments(source, self.windows, device, compute_dtype(source, device), flow):
            if hold:
                held.append({site: moment.cpu() for site, moment in moments.items()})
            yield moments
            del moments  # so that they are not held while the next block runs
        if hold:
            self._held[kind] = held

    def moments(self, sink_weight: int) -> dict[str, torch.Tensor] | None:
        """The whole second moments held for one weight of the first tokens, all tokens else alike: by "block.site"; None where none are held."""
        held = self._held.get((sink_weight, False))
        return None if held is None else {f"{index}.{site}": moment for index, moments in enumerate(held) for site, moment in moments.items()}

    def hold_moments(self, sink_weight: int, moments: dict[str, torch.Tensor]) -> None:
        """Hold what `moments` gave to another process."""
        self._held[sink_weight, False] = [{site: moments[f"{index}.{site}"] for site in SITES} for index in range(len(self.inputs))]


def moments_fit(source: Source) -> bool:
    """Whether the whole second moments of all blocks, of one kind of weights, take at most an eighth of the machine's memory."""
    a = source.architecture
    wanted = 4 * a.layers * sum(a.width(site) ** 2 for site in SITES)
    return 8 * wanted <= os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def measure(
    source: Source, calibration: Calibration | torch.Tensor, device: str = "auto", progress: Progress = no_progress, clock: Clock | None = None
) -> Statistics:
    """Run the model over the calibration text, and hold everything in memory, for any number of recipes.

    Args:
        source: the model.
        calibration: which text; or token ids (S, T) themselves.
        device: where blocks run.
        progress: called as (stage, done, total).
        clock: takes the times of the stages "text", "reading" and "activations".

    Raises:
        ValueError: no text, too little of it, windows longer than the model's context, or activations that overflow.
    """
    device = resolve_device(device)
    clock = clock or Clock(device)
    if isinstance(calibration, torch.Tensor):
        windows, settings = calibration, dict[str, Any](text="token ids")
        check_windows(windows, source)
    else:
        settings = calibration.to_dict()
        with clock("text"):
            windows = read_windows(source, calibration, device, progress)
    flow = placed(Flow(ranks=current_ranks(), clock=clock), source, windows, device)
    with clock("activations"):
        passed = collect(source, windows, device, compute_dtype(source, device), progress, flow)
        inputs = [{site: kept.to("cpu") for site, kept in block.items()} for block in passed]
    return Statistics(calibration_record(settings, windows), inputs, windows)


def pass_work(source: Source, windows: torch.Tensor, device: str, ranks: Ranks, second_pass: bool, learning: tuple[int, int] = (0, 0)) -> Work:
    """What passes over windows (S, T) take of this rank's memory; nothing but their shape is looked at. Other arguments as for `estimate`."""
    batch = BATCH_TOKENS[torch.device(device).type]
    mine = own_windows(windows, batch, ranks)
    tokens = ((mine.stop - mine.start) * windows.shape[1], max(batch, windows.shape[1]))
    return estimate(source.architecture, device, compute_dtype(source, device).itemsize, tokens, second_pass, learning)


def placed(flow: Flow, source: Source, windows: torch.Tensor, device: str, second_pass: bool = False) -> Flow:
    """A flow whose activations are kept where they fit: on the GPU, in host memory, or in a temporary file."""
    return replace(flow, place=place_activations(pass_work(source, windows, device, flow.ranks, second_pass), device, None))


class StoredInputs(Sequence[BlockInputs]):
    """What `collect` gave of each block, as records of a work folder that are read when asked for."""

    def __init__(self, work: WorkFolder, blocks: int) -> None:
        """Nothing is read yet."""
        self._work, self._blocks = work, blocks

    @overload
    def __getitem__(self, index: int) -> BlockInputs: ...

    @overload
    def __getitem__(self, index: slice) -> list[BlockInputs]: ...

    def __getitem__(self, index: int | slice) -> BlockInputs | list[BlockInputs]:
        """Read one block's record, or several."""
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(self._blocks))]
        inputs: dict[str, dict[str, torch.Tensor]] = {}
        for name, tensor in self._work.load(_inputs_record(index)).items():
            inputs.setdefault(name.split(".")[0], {})[name.split(".")[1]] = tensor
        return {site: SiteInputs(**parts) for site, parts in inputs.items()}

    def __len__(self) -> int:
        """Number of blocks."""
        return self._blocks


def measure_durably(
    source: Source, windows: torch.Tensor, recipe: Recipe, device: str, work: WorkFolder, flow: Flow, progress: Progress
) -> tuple[StoredInputs, torch.Tensor | None]:
    """Run the model over the windows, and keep what one recipe needs of every block in a work folder as it is done.

    A run that ended goes on behind the last block whose sums were kept; the blocks before it are run again, without
    sums, because their activations are not kept.

    Returns:
        What is kept of the blocks; and the moment (D, D) that the residual stream's basis is taken from, on the device
        of the first rank, None on the others and where the recipe has no such basis.
    """
    layers, whole = source.architecture.layers, recipe.rotation == "global"
    start = flow.ranks.agree(_measured(work, layers))
    total = ResidualSum()
    if start and whole and flow.ranks.first:
        total = ResidualSum(work.load(_measured_record(start - 1))["total"].to(device), 2 * start)
    if start < layers:
        flow = replace(flow, start=start)
        for index, inputs in enumerate(collect(source, windows, device, compute_dtype(source, device), progress, flow), start):
            if flow.ranks.first:
                if whole:
                    total.add(inputs)
                with flow.clock("writing"):
                    sums = {} if total.total is None else {"total": total.total}  # never changed in place
                    snapshot = not whole or (index + 1) % SNAPSHOT_BLOCKS == 0 or index + 1 == layers
                    work.later(_keep, work, index, kept_inputs(inputs, recipe), sums if snapshot else None)
        with flow.clock("writing"):
            work.settle()
    flow.ranks.wait()
    return StoredInputs(work, layers), total.moment() if whole and flow.ranks.first else None


def _keep(work: WorkFolder, index: int, inputs: BlockInputs, sums: dict[str, torch.Tensor] | None) -> None:
    """Make the records of one block: of its inputs, then of all sums up to it, in whose place those before can go."""
    tensors = {f"{site}.{part}": tensor for site, kept in inputs.items() for part, tensor in vars(kept).items() if tensor is not None}
    work.save(_inputs_record(index), tensors)
    if sums is not None:
        work.save(_measured_record(index), sums)
        for earlier in range(max(0, index - SNAPSHOT_BLOCKS), index):
            work.remove(_measured_record(earlier))


def _measured(work: WorkFolder, layers: int) -> int:
    """Blocks whose inputs are kept, with the sums up to the last of them."""
    return next((index + 1 for index in reversed(range(layers)) if work.has(_measured_record(index))), 0)


def _inputs_record(index: int) -> str:
    return f"inputs-{index:05d}"


def _measured_record(index: int) -> str:
    return f"measured-{index:05d}"


def calibration_record(settings: dict[str, Any], windows: torch.Tensor) -> dict[str, Any]:
    """What a checkpoint says of its calibration."""
    return {**settings, "samples": windows.shape[0], "seq_len": windows.shape[1], "windows_sha256": windows_hash(windows)}


def compute_dtype(source: Source, device: str) -> torch.dtype:
    """Type that blocks run in: bfloat16 for a model in half precision on a GPU, float32 otherwise.

    Float16 models do not run in float16: its range ends below the massive activations that some of them have.
    """
    return torch.bfloat16 if device.startswith("cuda") and source.half else torch.float32


def read_windows(source: Source, calibration: Calibration, device: str, progress: Progress = no_progress) -> torch.Tensor:
    """The calibration windows (S, T): from a text, or sampled from the model ("self", which loads it whole).

    Raises:
        ValueError: no text, too little of it, windows longer than the model's context, or tokens that it does not have.
    """
    check_length(calibration.seq_len, source)
    if calibration.text == "self":
        return sample_windows(full_model(source, torch.bfloat16, device), calibration, progress)
    if source.tokenizer is None:
        raise ValueError(f"{source.name}: no tokenizer, so text cannot be read; calibrate with 'self'")
    windows = token_windows(read_documents(calibration.text), source.tokenizer, calibration)
    check_windows(windows, source)
    return windows


def check_windows(windows: torch.Tensor, source: Source) -> None:
    """Refuse windows (S, T) longer than the model's context, and token ids that it does not have.

    Raises:
        ValueError: says which of the two.
    """
    check_length(windows.shape[1], source)
    if int(windows.max()) >= source.architecture.vocabulary or int(windows.min()) < 0:
        raise ValueError(f"calibration token {int(windows.max())} is not in the vocabulary of {source.architecture.vocabulary}")


def check_length(seq_len: int, source: Source) -> None:
    """Refuse windows longer than the model's context."""
    if seq_len > source.architecture.context:
        raise ValueError(f"seq-len is {seq_len} tokens, but {source.name} has a context of {source.architecture.context}")
