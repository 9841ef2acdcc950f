"""What a run will take, before anything of the model is loaded: sizes, memory, disk, and an estimate of time.

Sizes follow from the config alone. Times are counts of operations over rates that are measured on the device
(`stage_times.py`, `rates.py`).
"""

import shutil
import sys
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from rosaq.architecture import LINEARS, SITE_NORM, SITES, Architecture
from rosaq.calibration import Calibration
from rosaq.clock import Clock, no_progress
from rosaq.device import resolve_device
from rosaq.distillation import Settings
from rosaq.distillation.training import CHUNK_BYTES
from rosaq.distributed import ALONE
from rosaq.memory import available_bytes, resident_bytes
from rosaq.moments import BATCH_TOKENS, SAMPLED_TOKENS
from rosaq.plan import Plan, make_plan
from rosaq.rates import Rates, measure_rates
from rosaq.recipe import Recipe
from rosaq.run import Means, Run
from rosaq.sensitivity import LOGITS_BYTES
from rosaq.skeleton import meta_model
from rosaq.source import Source, is_hub_id, open_source, read_hub_config
from rosaq.stage_times import stage_seconds
from rosaq.statistics import check_length, compute_dtype


@dataclass(frozen=True)
class Forecast:
    """What a run will take, JSON-able; bytes and seconds.

    Attributes:
        model: what the user called it.
        recipe: its name.
        device: where it is computed.
        parameters: weights of the model.
        bits_per_weight: of the decoder's linear layers; at most, where the recipe has a target, like the next.
        checkpoint_bytes: of all tensors.
        original_bytes: of the same model in FP16.
        activations_bytes: hidden states of all calibration windows, those of several blocks where gradients are taken.
        activations: where they will be: "device", "host" or "disk".
        host_bytes: of this process at its peak, the activations included where they are on the host.
        host_available_bytes: what the machine has free, or `Means.max_memory`.
        device_bytes: at the peak, 0 on the CPU.
        device_available_bytes: free on the device now, 0 on the CPU.
        disk_bytes: at the output: the checkpoint, and what a run keeps beside it to go on from.
        disk_available_bytes: free there.
        seconds: of each stage.
        rates: what the seconds are computed from.
    """

    model: str
    recipe: str
    device: str
    parameters: int
    bits_per_weight: float
    checkpoint_bytes: int
    original_bytes: int
    activations_bytes: int
    activations: str
    host_bytes: int
    host_available_bytes: int
    device_bytes: int
    device_available_bytes: int
    disk_bytes: int
    disk_available_bytes: int
    seconds: dict[str, float]
    rates: Rates

    def to_dict(self) -> dict[str, Any]:
        """All fields, and the seconds of all stages together."""
        return {**asdict(self), "seconds_in_all": sum(self.seconds.values())}


def describe_source(model: str) -> Source:
    """A model to be planned for: opened where it is local; on the hub its config alone is read, and its tensors have no values.

    Raises:
        ValueError: as `open_source`.
    """
    if not is_hub_id(model):
        return open_source(model)
    config, dtype = read_hub_config(model)
    architecture = Architecture.of(config, model)
    tensors = {name: tensor.to(dtype) for name, tensor in meta_model(config).state_dict().items()}
    stored = dtype if dtype in (torch.float16, torch.bfloat16) else torch.float16
    return Source(model, config, architecture, tensors, stored, half=stored == dtype)


def forecast(
    model: str | Source,
    recipe: Recipe,
    calibration: Calibration | None = None,
    device: str = "auto",
    means: Means | None = None,
    output: Path | None = None,
    rates: Rates | None = None,
) -> Forecast:
    """What `quantize` with the same arguments will take, in one process.

    Args:
        model: hub id, local folder, `.gguf` file, or a source.
        recipe: the recipe.
        calibration: which text, and how much of it.
        device: "auto", "cpu", "cuda" or "cuda:N".
        means: bound on the memory.
        output: folder to make, for the room on its disk; by default in the current folder.
        rates: of the device; measured where they are not given.

    Raises:
        ValueError: as `quantize`, where it depends on neither weights nor text.
    """
    calibration, means, device = calibration or Calibration(), means or Means(), resolve_device(device)
    source = describe_source(model) if isinstance(model, str) else model
    check_length(calibration.seq_len, source)
    a, plan, cuda = source.architecture, _targeted(make_plan(recipe, source.architecture, source.biases()), recipe, source), device.startswith("cuda")
    run = Run(source, recipe, plan, device, ALONE, Clock(), no_progress)
    windows = torch.empty(calibration.samples, calibration.seq_len, device="meta")
    work, place = run.work(windows, run.states), run.flows(windows, means, None)[1].place
    free = min(torch.cuda.mem_get_info(device)[0], means.max_device_memory or sys.maxsize) if cuda else 0  # before the measurements take some
    rates = rates or measure_rates(source, recipe, device, compute_dtype(source, device))
    on_host = work.host + (work.activations if place == "host" else 0)
    if recipe.distillation_windows and not cuda:
        on_host = max(on_host, distillation_bytes(a, 4, calibration.seq_len))
    beside = kept_bytes(a, recipe, compute_dtype(source, device).itemsize) + (work.activations if place == "disk" else 0)
    beside += plan.checkpoint_bytes if recipe.distillation_windows else 0  # the one that is not distilled yet
    if recipe.token_weights == "gradient":
        beside += 4 * windows.numel() * a.layers * len(SITES)
    return Forecast(
        source.name, recipe.name, torch.cuda.get_device_name(device) if cuda else f"CPU, {torch.get_num_threads()} threads",
        source.parameters(), plan.bits_per_weight, plan.checkpoint_bytes, plan.original_bytes, work.activations, place,
        on_host + resident_bytes(), available_bytes() + resident_bytes() if means.max_memory is None else means.max_memory,
        device_bytes(a, recipe, work.activations if place == "device" else 0, calibration.seq_len) if cuda else 0,
        free,
        plan.checkpoint_bytes + beside, shutil.disk_usage(_existing(output or Path())).free,
        stage_seconds(a, recipe, plan, calibration, rates, "cuda" if cuda else "cpu"), rates,
    )  # fmt: skip


def _targeted(plan: Plan, recipe: Recipe, source: Source) -> Plan:
    """The plan with the sizes that a target allows at most, where the forms of its layers are not found yet."""
    if not recipe.target_bits or recipe.allocation:
        return plan
    weights = source.architecture.layers * _weights(source.architecture)
    more = int((recipe.target_bits - plan.bits_per_weight) * weights / 8)
    return replace(plan, bits_per_weight=recipe.target_bits, checkpoint_bytes=plan.checkpoint_bytes + more)


def _existing(path: Path) -> Path:
    path = path.expanduser().absolute()
    return next(folder for folder in (path, *path.parents) if folder.is_dir())


def _weights(a: Architecture) -> int:
    """Of the linear layers of a decoder block."""
    return sum(torch.Size(a.shape(role)).numel() for role in LINEARS)


def kept_bytes(a: Architecture, recipe: Recipe, itemsize: int) -> int:
    """What the work folder keeps of all blocks' inputs, until the checkpoint has its name."""
    block = SAMPLED_TOKENS * a.intermediate * itemsize + 4 * a.kv_heads * a.head_size**2
    if recipe.rotation == "per-layer":
        block += 4 * len(SITE_NORM) * a.hidden**2
    return a.layers * block + 2 * 8 * a.hidden**2


def device_bytes(a: Architecture, recipe: Recipe, activations: int, seq_len: int = 2048) -> int:
    """Memory of a CUDA device at the peak: the larger of running a block over a batch and of rounding it, by counting tensors."""
    weights, tokens = _weights(a), BATCH_TOKENS["cuda"]
    whole = recipe.needs_moments or recipe.target_bits > 0
    sums = 8 * sum(a.width(site) ** 2 for site in SITES) if whole else 8 * 2 * a.hidden**2
    running = weights * (2 + 4 + 2) + sums + tokens * 2 * (6 * a.hidden + 3 * a.intermediate)
    if recipe.token_weights == "gradient" or recipe.target_bits > 0:  # what a block keeps for its backward pass, and the logits of some tokens
        running = max(
            running, weights * (2 + 4 + 2) + tokens * 2 * (18 * a.hidden + 7 * a.intermediate), 2 * 4 * a.vocabulary * a.hidden + 5 * LOGITS_BYTES
        )
    rounding = weights * (2 + 4 + 4 + 4) + (2 * sums if whole else 0) + 4 * 4 * a.hidden * a.intermediate
    table = 4 * 3 * 4096 * a.hidden + 2 * a.vocabulary * a.hidden
    model = 0
    if recipe.rotation == "learned":
        model = 2 * (weights * a.layers + 2 * a.vocabulary * a.hidden) + 6 * 4 * weights
    if recipe.distillation_windows:
        model = max(model, distillation_bytes(a, 2, seq_len))
    return activations + max(running, rounding, table, model)


def distillation_bytes(a: Architecture, itemsize: int, seq_len: int) -> int:
    """Memory of the device that distillation takes at least: the original, a byte a code, float32 tables, inputs of all blocks, logits."""
    weights, table, tokens = a.layers * _weights(a), a.vocabulary * a.hidden, Settings().batch * seq_len
    return (
        weights * (itemsize + 1)
        + table * 2 * (itemsize + 4)
        + tokens * a.hidden * 4 * (a.layers + 1)
        + 6 * min(CHUNK_BYTES, 4 * tokens * a.vocabulary)
    )
