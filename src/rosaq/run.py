"""A run: what its stages share, what it may take, what tells it from another, and what it reports."""

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Self

import torch

from rosaq.architecture import SITES
from rosaq.calibration import Calibration
from rosaq.clock import Clock, Progress
from rosaq.distributed import Ranks
from rosaq.learned import BATCH
from rosaq.memory import Work, place_activations
from rosaq.moments import BATCH_TOKENS, Flow
from rosaq.plan import Plan, make_plan
from rosaq.recipe import Recipe
from rosaq.sensitivity import LOGITS_BYTES, held_states, token_weights
from rosaq.source import Source
from rosaq.statistics import Statistics, calibration_record, check_windows, compute_dtype, pass_work, read_windows
from rosaq.version import __version__
from rosaq.workfolder import WorkFolder, tensors_hash

SAMPLED_WINDOWS = "windows-self"  # record of the windows that were sampled from the model, which takes long


@dataclass(frozen=True)
class Means:
    """What a run may take, and what it does with the work of one that ended.

    Attributes:
        max_memory: host memory in bytes that the process may take, so that activations go to disk where they do not
            fit; None: what the machine has free.
        force: start over, whatever an earlier run with this output has done.
        max_device_memory: memory of a GPU in bytes that PyTorch may take; None: what is free.
    """

    max_memory: int | None = None
    force: bool = False
    max_device_memory: int | None = None


@dataclass
class Report:
    """What a run did, JSON-able: sizes, time of each stage in seconds, peak memory in bytes.

    Attributes:
        recipe: all of its fields.
        calibration: its settings, sizes, and a SHA-256 of its tokens.
        device: "cpu" or "cuda".
        bits_per_weight: of the decoder's linear layers.
        checkpoint_bytes: of all tensors.
        original_bytes: of the same model in FP16.
        seconds: time of each stage of this process; they add up to the run's.
        peak_host_bytes: of this process, as the operating system has it.
        peak_device_bytes: of PyTorch on the GPU, 0 on the CPU.
        activations: where they were kept, of a pass backward where there is one: "device", "host" or "disk"; "" where the checkpoint was
            whole already.
        resumed_blocks: decoder blocks that an earlier run had rounded.
        learning: how rotations were learned (`learned.Learned.record`), empty where they were not.
        model: the original's hub id, or the last part of its local path.
    """

    recipe: dict[str, Any]
    calibration: dict[str, Any]
    device: str
    bits_per_weight: float
    checkpoint_bytes: int
    original_bytes: int
    seconds: dict[str, float] = field(default_factory=dict)
    peak_host_bytes: int = 0
    peak_device_bytes: int = 0
    activations: str = ""
    resumed_blocks: int = 0
    learning: dict[str, Any] = field(default_factory=dict)
    model: str = ""

    def lasting(self) -> dict[str, Any]:
        """What is the same whenever and in how many goes the run is made: what the checkpoint says of it."""
        names = ("model", "recipe", "calibration", "device", "bits_per_weight", "checkpoint_bytes", "original_bytes")
        return {name: getattr(self, name) for name in (*names, *(["learning"] if self.learning else []))}


@dataclass(frozen=True)
class Run:
    """What every stage of a run shares.

    Attributes:
        source: the model.
        recipe: the recipe.
        plan: the recipe laid out over the model.
        device: where to compute.
        ranks: that share the work.
        clock: takes the stages' times.
        progress: is told of the stages.
    """

    source: Source
    recipe: Recipe
    plan: Plan
    device: str
    ranks: Ranks
    clock: Clock
    progress: Progress

    def allocated(self, allocation: str) -> Self:
        """The run with the allocation that was found for the recipe's target."""
        recipe = self.recipe.replace(allocation=allocation)
        return replace(self, recipe=recipe, plan=make_plan(recipe, self.source.architecture, self.source.biases()))

    def report(self, settings: dict[str, Any], windows: torch.Tensor) -> Report:
        """The report of the run, with nothing but times and memory to be filled in."""
        sizes = (self.plan.bits_per_weight, self.plan.checkpoint_bytes, self.plan.original_bytes)
        kept = {key: value for key, value in settings.items() if key != "statistics"}
        record, device = calibration_record(kept, windows), torch.device(self.device).type
        return Report(self.recipe.to_dict(), record, device, *sizes, self.clock.seconds, model=self.source.public_name)

    @property
    def backward(self) -> bool:
        """Whether gradients are taken: by the recipe's token weights, or to find an allocation."""
        return self.recipe.token_weights == "gradient" or (self.recipe.target_bits > 0 and not self.recipe.allocation)

    def work(self, windows: torch.Tensor, states: int = 1) -> Work:
        """Memory that a run over these windows takes, with so many hidden states of each; nothing but their shape is looked at."""
        learning = (min(BATCH, len(windows)) * windows.shape[1], windows.shape[1]) if self.recipe.rotation == "learned" else (0, 0)
        moments = self.recipe.needs_moments or self.recipe.target_bits > 0
        found = pass_work(self.source, windows, self.device, self.ranks, moments, learning)
        return replace(found, host=found.host + self._backward_bytes(windows), activations=states * found.activations)

    def _backward_bytes(self, windows: torch.Tensor) -> int:
        """Host memory that gradients take beside the activations: the tokens' weights, and on the CPU what a block keeps for its backward pass."""
        a, batch = self.source.architecture, max(BATCH_TOKENS["cpu"], windows.shape[1])
        if not self.backward:
            return 0
        found = 2 * 4 * windows.numel() * a.layers * len(SITES)
        return found if self.device.startswith("cuda") else found + batch * (16 * a.hidden + 8 * a.intermediate) * 4 + 5 * LOGITS_BYTES

    @property
    def states(self) -> int:
        """Hidden states of each window that are kept at a time: one, and more where gradients are taken."""
        return held_states(self.source.architecture.layers) if self.backward else 1

    def flows(self, windows: torch.Tensor, means: Means, folder: Path | None, beside: int = 0) -> tuple[Flow, Flow]:
        """How passes over these windows are run, by the memory there is: those forward, and those backward, which keep more hidden states.

        Args:
            windows: nothing but their shape is looked at.
            means: bound on the memory.
            folder: for activations on disk; None: where temporary files go.
            beside: hidden states of each window that someone else keeps at the same time.
        """
        places = [
            place_activations(self.work(windows, states + beside), self.device, means.max_memory, means.max_device_memory)
            for states in dict.fromkeys((1, self.states))
        ]
        forward = Flow(0, self.ranks, places[0], folder, self.clock, self.recipe.sink_weight)
        return forward, replace(forward, place=places[-1])

    def weights(self, statistics: Statistics, flow: Flow) -> list[dict[str, torch.Tensor]]:
        """What an error counts at each token, found by all ranks together and kept in the statistics; a pass backward unless they have it."""
        if self.ranks.agree(statistics.weights is None):
            dtype = compute_dtype(self.source, self.device)
            statistics.weights = token_weights(self.source, statistics.windows, self.device, dtype, flow, self.progress)
        assert statistics.weights is not None
        return statistics.weights

    def moments(self, statistics: Statistics, flow: Flow) -> Iterator[dict[str, torch.Tensor]]:
        """Whole second moments of each block's sites where the recipe looks at them, by a second pass or held; else nothing."""
        if self.recipe.needs_moments:
            return statistics.second_moments(self.source, self.device, flow)
        return iter([{}] * (self.source.architecture.layers - flow.start))

    def settings(self, calibration: Calibration | Statistics | torch.Tensor) -> tuple[dict[str, Any], torch.Tensor | None]:
        """What is known of the calibration before the work folder is opened: settings, and windows unless they are sampled."""
        if isinstance(calibration, Statistics):
            magnitudes = {f"{i:05d}.{site}": kept.magnitude for i, block in enumerate(calibration.inputs) for site, kept in block.items()}
            return {**calibration.record, "statistics": tensors_hash(magnitudes)}, calibration.windows
        if isinstance(calibration, torch.Tensor):
            check_windows(calibration, self.source)
            return calibration_record({"text": "token ids"}, calibration), calibration
        if calibration.text == "self":
            return calibration.to_dict(), None
        windows = None
        if self.ranks.first:
            with self.clock("text"):
                windows = read_windows(self.source, calibration, self.device, self.progress)
        windows = self.ranks.agree(windows)
        return calibration_record(calibration.to_dict(), windows), windows

    def sampled(self, calibration: Calibration, work: WorkFolder) -> torch.Tensor:
        """The windows that are sampled from the model itself, or have been by an earlier go."""
        if self.ranks.first and not work.has(SAMPLED_WINDOWS):
            with self.clock("text"):
                work.save(SAMPLED_WINDOWS, {"windows": read_windows(self.source, calibration, self.device, self.progress)})
        self.ranks.wait()
        return work.load(SAMPLED_WINDOWS)["windows"]

    def identity(self, settings: dict[str, Any]) -> dict[str, Any]:
        """What the bytes of the result follow from; a work folder of another identity is not continued."""
        cuda = self.device.startswith("cuda")
        hardware = torch.cuda.get_device_name(self.device) if cuda else f"CPU, {torch.get_num_threads()} threads"
        return {
            "model": self.source.identity(),
            "recipe": self.recipe.to_dict(),
            "calibration": settings,
            "rosaq": __version__,
            "torch": torch.__version__,
            "device": hardware,
            "ranks": self.ranks.count,
        }
