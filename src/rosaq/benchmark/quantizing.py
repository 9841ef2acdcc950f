"""Times quantization from shards on disk to a checkpoint on disk: random weights of a real model's shape.

The shards are written first, in the type that the model is published in; the tokens are drawn at random. Where only
some of a model's blocks are made, because the disk does not hold more, the time of all of them is extrapolated: what
does not grow with the blocks is counted once.
"""

import os
import shutil
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from rosaq.architecture import EMBEDDING, FINAL_NORM, HEAD, Architecture
from rosaq.benchmark.model_shapes import SHAPES, named_config
from rosaq.clock import Progress, no_progress
from rosaq.distributed import current_ranks
from rosaq.pipeline import quantize
from rosaq.recipe import Recipe
from rosaq.run import Means
from rosaq.safetensors_folder import Place, write_at
from rosaq.shard_files import ShardFiles
from rosaq.workfolder import flush

NAMES = ("tiny", *(name for name, sizes in SHAPES.items() if sizes["model_type"] == "llama"))  # no biases: `make_model` writes none
ONCE = ("open", "text", "embedding", "rotation", "tables")  # stages that take as long for a part of the blocks as for all
WRITERS = 8  # tensors of a model that is made are written at the same time


@dataclass(frozen=True)
class Case:
    """What is timed: a shape by name, how many of its blocks (None: all), calibration windows and tokens of each.

    Unless it is warm, the operating system forgets the model's files first, so that they come from the disk.
    """

    shape: str
    blocks: int | None = None
    samples: int = 128
    seq_len: int = 2048
    warm: bool = False


def make_model(shape: str, layers: int, folder: Path, device: str, progress: Progress = no_progress) -> None:
    """Write random weights of a shape: what is there already, whole, stays.

    A weight is normal with variance 1 / inputs, a norm's weight is between 0.5 and 1.5, and the first channels of the
    embedding are larger than the others, so that activations have strong directions.
    """
    config = named_config(shape, layers)
    a, dtype = Architecture.of(config), config.dtype
    names = [a.block_prefix(i) + name for i in range(layers) for name in a.required()]
    forms = {name: (a.tensor_shape(name.removeprefix(a.block_prefix(int(name.split(".")[2])))), dtype) for name in names}
    forms |= {f"{module}.weight": ((a.vocabulary, a.hidden), dtype) for module in (EMBEDDING, HEAD)}
    forms[f"{FINAL_NORM}.weight"] = ((a.hidden,), dtype)
    shards = ShardFiles(folder, forms)
    if (folder / "config.json").is_file():
        return
    folder.mkdir(parents=True, exist_ok=True)
    shards.create()
    generator, writing = torch.Generator(device=device).manual_seed(0), deque[Future[None]]()
    with ThreadPoolExecutor(WRITERS) as pool:
        for done, (name, (size, _)) in enumerate(forms.items(), 1):
            if len(size) == 1:
                tensor = 0.5 + torch.rand(size, generator=generator, device=device)
            else:
                tensor = torch.randn(size, generator=generator, device=device) * size[1] ** -0.5
            if name == f"{EMBEDDING}.weight":
                tensor[:, : a.hidden // 32] *= 8
            if len(writing) == WRITERS:
                writing.popleft().result()
            writing.append(pool.submit(_write, shards.places[name], tensor.to(dtype)))
            progress("making the model", done, len(forms))
        for future in writing:
            future.result()
        list(pool.map(flush, {place.file for place in shards.places.values()}))
    shards.write_index()
    config.save_pretrained(folder)


def _write(place: Place, tensor: torch.Tensor) -> None:
    handle = os.open(place.file, os.O_WRONLY)
    try:
        write_at(handle, tensor.cpu(), place.start)
    finally:
        os.close(handle)


def drop_from_cache(folder: Path) -> None:
    """Have the operating system forget what it holds of a folder's files, so that they are read from the disk."""
    for file in folder.iterdir():
        handle = os.open(file, os.O_RDONLY)
        try:
            os.fsync(handle)
            os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(handle)


def benchmark_quantize(case: Case, folder: Path, recipe: Recipe, device: str, means: Means, progress: Progress = no_progress) -> dict[str, Any]:
    """Make a model of a shape, and quantize it from disk to disk. Under `torchrun` the ranks share the work.

    Args:
        case: which shape, how much of it, and how many tokens.
        folder: on the disk that is measured; the model is left in it, the checkpoint is not.
        recipe: what to quantize by.
        device: "cpu", "cuda" or "cuda:N".
        means: bound on the host memory.
        progress: called as (stage, done, total).

    Returns:
        Shape, blocks, the run's report, and the seconds of each stage for all blocks.

    Raises:
        ValueError: no such shape, or more blocks than it has.
    """
    name, ranks = case.shape, current_ranks()
    if name not in NAMES:
        raise ValueError(f"shape {name!r}; allowed are {', '.join(NAMES)}")
    a = Architecture.of(named_config(name))
    layers = a.layers if case.blocks is None else case.blocks
    if not 1 <= layers <= a.layers:
        raise ValueError(f"blocks is {layers}; {name} has 1 to {a.layers}")
    model, output = folder / f"{name}-{layers}", folder / f"{name}-{layers}-quantized"
    if ranks.first:
        make_model(name, layers, model, device, progress)
        if not case.warm:
            drop_from_cache(model)
        if output.exists():
            shutil.rmtree(output)
    ranks.wait()
    if device.startswith("cuda"):
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    ids = torch.randint(a.vocabulary, (case.samples, case.seq_len), generator=torch.Generator().manual_seed(0))
    report = quantize(str(model), output, recipe, ids, device, progress, Means(means.max_memory, force=True))
    if ranks.first:
        shutil.rmtree(output)
    return {
        "shape": name,
        "blocks": layers,
        "blocks_of_model": a.layers,
        "ranks": ranks.count,
        "hardware": torch.cuda.get_device_name() if device.startswith("cuda") else "CPU",
        "warm": case.warm,
        "tokens": [case.samples, case.seq_len],
        "report": vars(report),
        "seconds_of_all_blocks": {stage: time * (1 if stage in ONCE else a.layers / layers) for stage, time in report.seconds.items()},
    }
