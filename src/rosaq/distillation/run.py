"""A packed checkpoint and its original in, a checkpoint of the same form and size with better precise parts out."""

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from rosaq.architecture import Architecture
from rosaq.calibration import Calibration, windows_hash
from rosaq.card import Pictures
from rosaq.checkpoint_writer import CheckpointWriter
from rosaq.clock import Clock, Progress, no_progress, peak_memory
from rosaq.device import resolve_device
from rosaq.distillation.trainable import TrainableLinear, is_norm, make_trainable
from rosaq.distillation.training import Settings, train
from rosaq.engines.loading import verify_checkpoint
from rosaq.evaluation.perplexity import divergence
from rosaq.safetensors_folder import SafetensorsFolder
from rosaq.skeleton import full_model
from rosaq.source import Source, open_source
from rosaq.statistics import read_windows
from rosaq.workfolder import check_destination

KEPT_BYTES = (72, 28)  # estimate of what autograd keeps of a block for each token, times its width and that of its feed-forward part
LEAST_SHARE = 1 / 8  # of the way that training went, below which it is given up
RECORD = "distillation"  # its key in quantization_config's calibration, and in rosaq.json
TIMES = ("seconds", "peak_host_bytes", "peak_device_bytes")  # not in rosaq.json, so that the same run gives the same bytes


@dataclass
class Report:
    """What a run did, JSON-able.

    Attributes:
        settings: of the training.
        calibration: which text, with a SHA-256 of the training windows.
        device: where it ran.
        before: the checkpoint beside its original on the held-out windows, `Divergence` as a mapping.
        after: likewise the new checkpoint, with every value as it is stored.
        losses: divergence of each step's windows, in nats.
        share: of the way from the first values to the trained ones that was kept, 1 but where its end is worse than its beginning.
        seconds: of each stage.
        peak_host_bytes: of this process.
        peak_device_bytes: of PyTorch on a CUDA device.
    """

    settings: dict[str, Any]
    calibration: dict[str, Any]
    device: str
    before: dict[str, Any] = field(default_factory=dict)
    after: dict[str, Any] = field(default_factory=dict)
    losses: list[float] = field(default_factory=list)
    share: float = 1.0
    seconds: dict[str, float] = field(default_factory=dict)
    peak_host_bytes: int = 0
    peak_device_bytes: int = 0

    def record(self) -> dict[str, Any]:
        """What the checkpoint's config says of it: the same for the same run, so no times."""
        held_out = {"held_out_kl_before": self.before["kl_divergence"], "held_out_kl_after": self.after["kl_divergence"]}
        return {"settings": self.settings, "calibration": self.calibration, "steps": len(self.losses), "share": self.share, **held_out}


def distill(
    checkpoint: str | Path,
    model: str | Source,
    output: str | Path,
    calibration: Calibration = Calibration(samples=400),  # noqa: B008  (frozen)
    settings: Settings = Settings(),  # noqa: B008  (frozen)
    device: str = "auto",
    progress: Progress = no_progress,
) -> Report:
    """Train a checkpoint's group scales, salient weights, norms and, if wanted, codes against its original, and write the result.

    Zero points, orders, biases and tables stay as they are, and so do the format and the bits per weight. The whole
    original (bfloat16 on a GPU) and the unpacked codes (a byte a weight; 17 where they are trained) are on the device.
    Products are computed in bfloat16 on a GPU, between float32 residual streams; all in float32 on the CPU. The same call
    gives the same tensors on the same CPU and number of threads. On a GPU attention's backward pass may add in an order
    that is not fixed. Where the divergence on the held-out windows has risen, half of the way that training went is kept, or a quarter
    or an eighth: the first of these at which it falls.

    Args:
        checkpoint: folder of a rosaq checkpoint; its hashes are checked.
        model: the original that it was made of: hub id, local folder, `.gguf` file, or an opened source.
        output: folder to make; it must not exist, or be empty.
        calibration: text to train on; `settings.held_out` windows are read beyond its samples. Its seed is that of the
            training, too.
        settings: how to train.
        device: "auto" (a CUDA GPU where there is one), "cpu", "cuda" or "cuda:N".
        progress: called as (stage, done, total).

    Returns:
        Divergences before and after, losses, times and memory.

    Raises:
        ValueError: the checkpoint is not whole, is distilled already, rotates at run time or is not of this original,
            there is too little text, the divergence on the held-out windows rises even at an eighth of the way, or the destination is taken;
            nothing is left behind.
    """
    checkpoint, device = Path(checkpoint), resolve_device(device)
    clock = Clock(device)
    check_destination(Path(output).expanduser().absolute())
    with clock("open"):
        manifest = verify_checkpoint(checkpoint)
        source = open_source(model) if isinstance(model, str) else model
        config = _config(checkpoint, source)
    with clock("text"):
        windows, held_out = _windows(source, calibration, settings, device, progress)
    report = Report(settings.to_dict(), {**calibration.to_dict(), "windows_sha256": windows_hash(windows)}, device, seconds=clock.seconds)
    with CheckpointWriter(output) as writer:
        with clock("loading"):
            student, parameters, teacher = _load(checkpoint, source, device, settings, settings.batch * calibration.seq_len)
        stored = SafetensorsFolder(checkpoint)
        with clock("training"):
            report.before = divergence(student, teacher, held_out, progress).to_dict()
            report.losses = train(student, teacher, parameters, windows, settings, calibration.seed, progress)
            _keep_share(report, student, stored, lambda: divergence(student, teacher, held_out, progress).to_dict())
        report.peak_host_bytes, report.peak_device_bytes = peak_memory(device)
        with clock("writing"):
            for name, tensor in _tensors(student, stored):
                writer.add({name: tensor})
            _finish(writer, checkpoint, config, manifest, source, report)
    return report


def _config(checkpoint: Path, source: Source) -> Any:
    """The checkpoint's config; an original of another form is refused, and a second distillation, of which the record would forget the first."""
    config = AutoConfig.from_pretrained(checkpoint, local_files_only=True, trust_remote_code=False)
    own, other = Architecture.of(config, str(checkpoint)), source.architecture
    for part in fields(Architecture):  # a table that was tied may be stored twice, each with its own rotation
        if part.name != "tied" and getattr(own, part.name) != getattr(other, part.name):
            found = [getattr(each, part.name) for each in (own, other)]
            found = [value.model_type if part.name == "family" else value for value in found]
            raise ValueError(f"{source.name}: not the original of {checkpoint}: {part.name} is {found[1]}, the checkpoint's is {found[0]}")
    if RECORD in config.quantization_config.get("calibration", {}):
        raise ValueError(f"{checkpoint}: distilled already; start from the checkpoint before")
    return config


def _windows(source: Source, calibration: Calibration, settings: Settings, device: str, progress: Progress) -> tuple[torch.Tensor, torch.Tensor]:
    """Windows to train on, and those that are held out."""
    if calibration.samples < settings.batch:
        raise ValueError(f"samples is {calibration.samples}; distillation takes {settings.batch} windows a step, so it needs that many or more")
    windows = read_windows(source, replace(calibration, samples=calibration.samples + settings.held_out), device, progress)
    return windows[: calibration.samples].clone(), windows[calibration.samples :].clone()


def _load(checkpoint: Path, source: Source, device: str, settings: Settings, tokens: int) -> tuple[Any, dict[str, list[torch.nn.Parameter]], Any]:
    """Student, what of it is trained, and teacher."""
    compute = torch.bfloat16 if device.startswith("cuda") else torch.float32
    teacher = full_model(source, compute, device)
    student = AutoModelForCausalLM.from_pretrained(
        checkpoint, dtype=torch.float32, device_map=device, local_files_only=True, trust_remote_code=False
    ).eval()
    parameters = make_trainable(student, compute, codes=settings.learning_rates[-1] > 0, rerun=not _keeps_blocks(source.architecture, device, tokens))
    return student, parameters, teacher


def _keeps_blocks(a: Architecture, device: str, tokens: int) -> bool:
    """Whether all that the blocks compute for one step may be kept for the backward pass: where it takes a third of a GPU's free memory."""
    if not device.startswith("cuda"):
        return False
    wanted = tokens * a.layers * (KEPT_BYTES[0] * a.hidden + KEPT_BYTES[1] * a.intermediate)
    return 3 * wanted <= torch.cuda.mem_get_info(device)[0]


def _keep_share(report: Report, student: Any, stored: SafetensorsFolder, measure: Callable[[], dict[str, Any]]) -> None:
    """Round what was trained as it is stored and measure it; while that is worse than before, go back half of the way first.

    The direction is one in which the divergence falls, even where the steps were too long for a model: a share costs a few forward passes,
    another training the whole time.
    """
    _round_norms(student, stored)
    report.after = whole = measure()
    before = report.before["kl_divergence"]
    while report.after["kl_divergence"] > before:
        if report.share <= LEAST_SHARE:
            found = f"from {before:.4f} to {whole['kl_divergence']:.4f}, and to {report.after['kl_divergence']:.4f} at {report.share:g} of the way"
            raise ValueError(f"the divergence on held-out windows rose {found}; lower the learning rates or give more text")
        report.share /= 2
        _go_half_back(student, stored)
        _round_norms(student, stored)
        report.after = measure()


@torch.no_grad()
def _go_half_back(student: Any, stored: SafetensorsFolder) -> None:
    """Halve the way from the stored values to the present ones, which is in the layers and norms and needs no copy."""
    for name, layer in _trained_layers(student).items():
        layer.go_half_back(stored[f"{name}.salient"] if layer.salient is not None else None)
    for name, parameter in student.named_parameters():
        if is_norm(name):
            parameter.lerp_(stored[name].to(parameter), 0.5)


def _trained_layers(student: Any) -> dict[str, TrainableLinear]:
    return {name: layer for name, layer in student.named_modules() if isinstance(layer, TrainableLinear) and layer.ratio.requires_grad}


@torch.no_grad()
def _round_norms(student: Any, stored: SafetensorsFolder) -> None:
    """Give the norms the values that their stored type can hold."""
    for name, parameter in student.named_parameters():
        if is_norm(name):
            parameter.copy_(parameter.to(stored[name].dtype))


def _tensors(student: Any, stored: SafetensorsFolder) -> Iterator[tuple[str, torch.Tensor]]:
    """All tensors of the new checkpoint, in the order of the old one."""
    parameters = dict(student.named_parameters())
    trained = _trained_layers(student)
    for name in stored:
        module, _, part = name.rpartition(".")
        if is_norm(name):
            yield name, parameters[name].detach().to(stored[name].dtype)
        elif module in trained and part in (stored_now := trained[module].stored()):
            yield name, stored_now[part]
        else:
            yield name, stored[name]


def _finish(writer: CheckpointWriter, checkpoint: Path, config: Any, manifest: dict[str, Any], source: Source, report: Report) -> None:
    config.quantization_config["calibration"] = {**config.quantization_config.get("calibration", {}), RECORD: report.record()}
    kept = {key: value for key, value in manifest.items() if key not in ("format_version", "files")}
    card = checkpoint / "README.md"
    text = (card.read_text(encoding="utf-8") if card.is_file() else "") + _card_section(report)
    companions = [part for part in (source.tokenizer, source.generation_config, Pictures.of(checkpoint)) if part is not None]
    lasting = {key: value for key, value in asdict(report).items() if key not in TIMES}
    writer.finish(config, {**kept, RECORD: lasting}, {"README.md": text}, companions)


def _card_section(report: Report) -> str:
    text, before, after = report.calibration, report.before, report.after
    kept = "" if report.share == 1 else f"At the end of training it had risen, so {report.share:g} of the way there is kept.\n"
    what = "Group scales, salient weights, norms and codes" if report.settings["learning_rates"][-1] else "Group scales, salient weights and norms"
    return f"""
## Distilled

{what} were then trained against the original on {text["samples"]} windows of {text["seq_len"]}
tokens of `{text["text"]}` (seed {text["seed"]}; SHA-256 of the token ids {text["windows_sha256"]}), {len(report.losses)} steps. On
{report.settings["held_out"]} windows that were not trained on, KL divergence fell from {before["kl_divergence"]:.4f} to {after["kl_divergence"]:.4f}.
{kept}"""
