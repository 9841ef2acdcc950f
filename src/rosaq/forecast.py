"""What a run will take, before anything of the model is loaded: sizes, memory, disk, and an estimate of time.

Sizes follow from the config alone. Times are counts of operations over rates that are measured on the device
(`rates.py`): within a factor of two where it was tried, which is the CPU (docs/log.md, 2026-11-22).
"""

import shutil
import sys
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from rosaq.allocation import ROWS, TOKENS
from rosaq.architecture import LINEARS, SITE_NORM, SITE_OF, SITES, Architecture
from rosaq.calibration import Calibration
from rosaq.clock import Clock, no_progress
from rosaq.device import resolve_device
from rosaq.distillation import Settings
from rosaq.distillation.training import CHUNK_BYTES
from rosaq.distributed import ALONE
from rosaq.learned import BATCH
from rosaq.memory import available_bytes, resident_bytes
from rosaq.moments import BATCH_TOKENS, SAMPLED_TOKENS
from rosaq.plan import Plan, make_plan, site_options
from rosaq.rates import DISK, Rates, measure_rates
from rosaq.recipe import Recipe
from rosaq.rounding.clipping import SHARES, SHRUNK, UNCLIPPED
from rosaq.rounding.scaling import STEPS
from rosaq.run import Means, Run
from rosaq.sensitivity import LOGITS_BYTES, held_states
from rosaq.skeleton import meta_model
from rosaq.source import Source, is_hub_id, open_source, read_hub_config
from rosaq.statistics import check_length, compute_dtype

REACHED = {"cpu": 0.85, "cuda": 0.55}  # share of a bare product's rate that blocks reach; cuda: an estimate
BACKWARD = 4  # times a pass forward: once forward, once more for the inputs, and back
DISTILLING = 10  # operations a weight and token: the teacher forward, the student forward, once more, and back
EIGEN = 10  # operations over n^3 of an eigendecomposition, which runs at EIGEN_RATE of a product's rate
EIGEN_RATE = 0.2
COLUMN_LAUNCHES = 8  # operations that GPTQ starts for each channel
SAMPLED_TOGETHER = 64  # windows that "self" samples at a time
LAYER_LAUNCHES = 40  # operations of a decoder block for one token


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
    states = held_states(a.layers) if run.backward else 1
    work, place = run.work(windows, states), run.flow(windows, means, Path(), states).place
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
    weights = source.architecture.layers * sum(_weights(source.architecture).values())
    more = int((recipe.target_bits - plan.bits_per_weight) * weights / 8)
    return replace(plan, bits_per_weight=recipe.target_bits, checkpoint_bytes=plan.checkpoint_bytes + more)


def _existing(path: Path) -> Path:
    path = path.expanduser().absolute()
    return next(folder for folder in (path, *path.parents) if folder.is_dir())


def _weights(a: Architecture) -> dict[str, int]:
    return {role: torch.Size(a.shape(role)).numel() for role in LINEARS}


def kept_bytes(a: Architecture, recipe: Recipe, itemsize: int) -> int:
    """What the work folder keeps of all blocks' inputs, until the checkpoint has its name."""
    block = SAMPLED_TOKENS * a.intermediate * itemsize + 4 * a.kv_heads * a.head_size**2
    if recipe.rotation == "per-layer":
        block += 4 * len(SITE_NORM) * a.hidden**2
    return a.layers * block + 2 * 8 * a.hidden**2


def device_bytes(a: Architecture, recipe: Recipe, activations: int, seq_len: int = 2048) -> int:
    """Memory of a CUDA device at the peak: the larger of running a block over a batch and of rounding it, by counting tensors."""
    weights, tokens = sum(_weights(a).values()), BATCH_TOKENS["cuda"]
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
    weights, table, tokens = a.layers * sum(_weights(a).values()), a.vocabulary * a.hidden, Settings().batch * seq_len
    return (
        weights * (itemsize + 1)
        + table * 2 * (itemsize + 4)
        + tokens * a.hidden * 4 * (a.layers + 1)
        + 6 * min(CHUNK_BYTES, 4 * tokens * a.vocabulary)
    )


def stage_seconds(a: Architecture, recipe: Recipe, plan: Plan, calibration: Calibration, rates: Rates, kind: str) -> dict[str, float]:
    """Seconds of each stage on one device.

    Args:
        a: the model's sizes.
        recipe: the recipe.
        plan: the recipe laid out over the model.
        calibration: how much text.
        rates: of the device.
        kind: "cpu" or "cuda".
    """
    tokens, weights = calibration.samples * calibration.seq_len, _weights(a)
    product, exact = rates.product * REACHED[kind], rates.exact * REACHED[kind]
    attention = a.width("attn_out")
    run = tokens * (2 * sum(weights.values()) + 4 * calibration.seq_len * attention) / product
    seconds = {"text": 0.0, "embedding": 2 * a.vocabulary * a.hidden / rates.read}
    if calibration.text == "self":
        steps = -(-calibration.samples // SAMPLED_TOGETHER) * calibration.seq_len
        each = 2 * min(SAMPLED_TOGETHER, calibration.samples) * (sum(weights.values()) * a.layers + a.vocabulary * a.hidden)
        seconds["text"] = steps * (each / product + a.layers * LAYER_LAUNCHES / rates.launches)
    seconds["activations"] = a.layers * (run + tokens * 2 * (2 * a.hidden**2 + attention * a.head_size) / product)
    if recipe.token_weights == "gradient":
        seconds["gradients"] = a.layers * BACKWARD * run
    if recipe.target_bits and not recipe.allocation:
        seconds["allocation"] = a.layers * _allocation(a, recipe, calibration.seq_len, product, rates)
    if recipe.needs_moments:
        seconds["second pass"] = a.layers * (run + tokens * 2 * sum(a.width(site) ** 2 for site in SITES) / product)
    if recipe.rotation == "learned":
        step = min(BATCH, calibration.samples) * calibration.seq_len * 8 * sum(weights.values()) / product + sum(weights.values()) / rates.fitted
        seconds["learning"] = recipe.learning_steps * a.layers * step
    seconds["rotation"] = _eigen(a.hidden, exact, rates) if recipe.rotation == "global" else 0.0
    seconds["preparing"] = a.layers * _preparing(a, recipe, weights, exact, rates)
    seconds["rounding"] = a.layers * _rounding(a, recipe, weights, exact, rates)
    seconds["tables"] = _tables(a, recipe, plan, exact, rates)
    if recipe.distillation_windows:
        trained = recipe.distillation_windows * recipe.distillation_epochs * calibration.seq_len
        seconds["distillation"] = trained * DISTILLING * (a.layers * sum(weights.values()) + a.vocabulary * a.hidden) / product
    passes = 2 + recipe.needs_moments
    reading = passes * 2 * a.layers * sum(weights.values()) / rates.read
    behind = sum(seconds.values()) if kind == "cuda" else 0.0  # on a GPU the next block is read meanwhile
    seconds["reading"] = max(0.0, reading - behind)
    seconds["writing"] = plan.checkpoint_bytes * (1 / rates.hashed + 1 / DISK)
    return seconds


def _eigen(size: int, exact: float, rates: Rates) -> float:
    """Of one symmetric matrix: it is cut down row by row, each by some small operations."""
    return EIGEN * size**3 / (EIGEN_RATE * exact) + EIGEN * size / rates.launches


def _preparing(a: Architecture, recipe: Recipe, weights: dict[str, int], exact: float, rates: Rates) -> float:
    """Of one block: its bases and their products with the weights, and AWQ's searches for scales."""
    seconds = 0.0
    if recipe.rotation != "none":
        seconds += 2 * a.hidden * sum(weights.values()) / exact
    if recipe.rotation == "per-layer":
        seconds += len(SITE_NORM) * _eigen(a.hidden, exact, rates)
    if recipe.head_rotation == "head-wise":
        seconds += a.kv_heads * _eigen(a.head_size, exact, rates)
    if recipe.head_rotation == "shared":
        seconds += _eigen(a.head_size, exact, rates)
    if recipe.head_rotation == "concatenated":
        seconds += _eigen(a.width("attn_out"), exact, rates)
    for site, roles in SITES.items():
        if (recipe.down_scaling if site == "mlp_out" else recipe.scaling) == "awq":
            sampled = site == "mlp_out" and not recipe.needs_moments
            loss = 2 * (SAMPLED_TOKENS if sampled else a.width(site))
            seconds += STEPS * sum(weights[role] for role in roles) * (1 / rates.fitted + loss / exact)
    return seconds


def _allocation(a: Architecture, recipe: Recipe, seq_len: int, product: float, rates: Rates) -> float:
    """Of one block: second moments of some of the text, gradients of it if they are not there, and the expected loss of every form."""
    weights = sum(_weights(a).values())
    seen = sum(min(ROWS, sum(a.shape(role)[0] for role in roles)) * a.width(site) for site, roles in SITES.items())
    forward = 2 * weights + 4 * seq_len * a.width("attn_out")
    passes = 1 if recipe.token_weights == "gradient" else 1 + BACKWARD
    forms = max(len(options) for options in site_options(recipe).values())
    fits = forms * (len(SHRUNK) if recipe.clipping == "mse" else 1)
    factors = {site: len({form.salient for form in options}) for site, options in site_options(recipe).items()} if recipe.rounding == "gptq" else {}
    factored = sum(count * 4 * a.width(site) ** 3 for site, count in factors.items()) / rates.exact
    return factored + TOKENS * (passes * forward + 2 * sum(a.width(site) ** 2 for site in SITES)) / product + fits * seen / rates.fitted


def _rounding(a: Architecture, recipe: Recipe, weights: dict[str, int], exact: float, rates: Rates) -> float:
    """Of one block: grids and codes, with AWQ's search for ranges and GPTQ's feedback where the recipe has them."""
    seconds = sum(weights.values()) / rates.packed
    if recipe.clipping == "awq":
        searched = sum(size for role, size in weights.items() if role not in UNCLIPPED)
        seconds += len(SHARES) * searched * (1 / rates.fitted + 2 * recipe.group_size / exact)
    if recipe.clipping == "mse":
        seconds += len(SHRUNK) * sum(weights.values()) / rates.fitted
    if recipe.rounding == "gptq":
        for role, size in weights.items():  # a sweep is as GPTQ is; each fit of the scales is two products with the moment
            width = a.width(SITE_OF[role])
            fits = 2 * (1 + recipe.refinement) if recipe.refinement else 0
            seconds += size * ((1 + recipe.refinement + 2 * fits) * width + 2 * recipe.group_size) / exact
        for site in SITES:
            width = a.width(site)
            seconds += 4 * width**3 / exact + (1 + recipe.refinement) * COLUMN_LAUNCHES * width / rates.launches
    return seconds


def _tables(a: Architecture, recipe: Recipe, plan: Plan, exact: float, rates: Rates) -> float:
    """Of embedding and lm_head: rotated, and rounded to 8 bits where the plan says so."""
    size = a.vocabulary * a.hidden
    rotated = 2 * a.hidden * 2 * size / exact if recipe.rotation not in ("none", "per-layer") else 0.0
    return rotated + (2 * size / rates.packed if plan.tables else 0.0)
