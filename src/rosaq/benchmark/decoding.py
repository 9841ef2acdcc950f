"""Decoding speed of whole models, by the paper's protocol, for rosaq and its peers in one run.

As many tokens are generated as are given. DecodeSpeed = 1 / median time per token, Throughput = DecodeSpeed x batch (ROSAQ Eq. 9, 10,
arXiv:2506.13472). A case is a way of running a model: an engine and how the weights are stored. Each runs in a process of
its own, since an engine does not give back all of its memory. Starting (compiling, capturing graphs) takes most of the time, so several
cases may start together; they are always timed one after the other, while the others wait. Peers have random weights of the same
shape, and so has rosaq unless a checkpoint is given: the time of a step does not depend on the values.
"""

import json
import math
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from rosaq.architecture import SITES, Architecture
from rosaq.benchmark.model_shapes import shape_config
from rosaq.checkpoint import is_checkpoint
from rosaq.engines.dummy import dummy_config
from rosaq.recipe import Recipe

PAIRS = ((1, 128), (16, 128), (64, 256), (128, 128))  # batch, tokens given and generated
ENGINES = ("vllm", "transformers", "transformers-compiled")
# How weights are stored -> kernels of vLLM that must not be taken, and the one that must.
PEERS: dict[str, tuple[str, str | None]] = {
    "machete": ("MarlinLinearKernel,CutlassW4A8LinearKernel", "MacheteLinearKernel"),
    "marlin": ("MacheteLinearKernel,CutlassW4A8LinearKernel", "MarlinLinearKernel"),
    "w4a16": ("", None),  # whichever kernel vLLM takes by itself
}
WEIGHTS = ("fp16", "rosaq", *PEERS)


@dataclass(frozen=True)
class Settings:
    """What is the same for all cases.

    Attributes:
        pairs: (batch, tokens) to time; so many tokens are given and so many generated.
        dtype: "float16" or "bfloat16", of the activations and of unquantized weights.
        kv_cache_dtype: vLLM's option: "auto" or "fp8".
        tensor_parallel: GPUs that vLLM spreads a model over.
        repeats: how often each pair is run; the median is taken over all steps.
        eager: no CUDA graphs and no compiler in vLLM.
        at_once: how many cases start together; the device must hold them side by side.
        vllm_options: further arguments of `vllm.LLM`, such as {"attention_backend": "TRITON_ATTN"}.
    """

    pairs: tuple[tuple[int, int], ...] = PAIRS
    dtype: str = "float16"
    kv_cache_dtype: str = "auto"
    tensor_parallel: int = 1
    repeats: int = 2
    eager: bool = False
    at_once: int = 1
    vllm_options: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Refuse what no engine can do."""
        if self.dtype not in ("float16", "bfloat16"):
            raise ValueError(f"dtype {self.dtype!r}; allowed are float16, bfloat16")
        if self.kv_cache_dtype not in ("auto", "fp8"):
            raise ValueError(f"KV cache dtype {self.kv_cache_dtype!r}; allowed are auto, fp8")
        if self.at_once < 1 or self.repeats < 1:
            raise ValueError(f"at_once is {self.at_once} and repeats {self.repeats}; both are 1 or more")
        if not self.pairs or any(batch < 1 or tokens < 8 for batch, tokens in self.pairs):
            raise ValueError(f"batch/tokens pairs {self.pairs}; each needs a batch of 1 or more and 8 tokens or more")


@dataclass(frozen=True)
class Case:
    """One engine with one way of storing weights, and the folder that it reads.

    Attributes:
        engine: one of `ENGINES`.
        weights: one of `WEIGHTS`.
        folder: of the model; with `dummy`, only its config.json is read.
        dummy: weights are random.
    """

    engine: str
    weights: str
    folder: str
    dummy: bool = True


@dataclass
class Timing:
    """What a case measured, or why it did not.

    Attributes:
        steps_ms: per pair "batch/tokens", the median time of a step that gives every sequence one token, in milliseconds.
        details: versions, device, kernel, memory in bytes.
        failure: last line of the error, where there was one.
    """

    engine: str
    weights: str
    steps_ms: dict[str, float] = field(default_factory=dict)
    details: dict[str, Any] = field(default_factory=dict)
    failure: str | None = None


def benchmark_decoding(
    model: str,
    recipe: Recipe,
    settings: Settings,
    engines: Sequence[str] = ("vllm", "transformers"),
    weights: Sequence[str] = ("fp16", "rosaq", "machete", "marlin"),
    done: Callable[[Timing, dict[str, Any]], None] = lambda timing, result: None,
) -> dict[str, Any]:
    """Time every engine with every way of storing weights.

    Args:
        model: a shape of `SHAPES`, a model folder (its sizes are taken), or a rosaq checkpoint (its weights too).
        recipe: of the random rosaq weights; a checkpoint has its own.
        settings: what is the same for all.
        engines: of `ENGINES`. Peers at 4 bits are timed in vLLM only.
        weights: of `WEIGHTS`.
        done: called with each timing when it is there, and the result so far.

    Returns:
        JSON-able: settings, one row per case and pair with DecodeSpeed and Throughput in tokens per second and, in its own engine,
        the ratios of speed to FP16 and to the fastest peer at 4 bits; and the cases that failed.

    Raises:
        ValueError: an unknown name, or a context that is too short for the pairs.
    """
    for name, given, allowed in (("engine", engines, ENGINES), ("weights", weights, WEIGHTS)):
        if unknown := [one for one in given if one not in allowed]:
            raise ValueError(f"{name} {unknown[0]!r}; allowed are {', '.join(allowed)}")
    config = shape_config(model)
    longest = max(2 * tokens for _, tokens in settings.pairs)
    if longest > config.max_position_embeddings:
        raise ValueError(f"{model}: a context of {config.max_position_embeddings} tokens is too short for {longest}; give pairs of fewer tokens")
    with tempfile.TemporaryDirectory(prefix="rosaq-decode-") as scratch:
        timings: list[Timing] = []
        wanted = [(engine, kind) for engine in engines for kind in weights if engine == "vllm" or kind not in PEERS]
        for first in range(0, len(wanted), settings.at_once):
            cases = [_case(*case, model, recipe, settings, Path(scratch)) for case in wanted[first : first + settings.at_once]]
            for timing in _timed(cases, settings, Path(scratch)):
                timings.append(timing)
                done(timing, _result(model, recipe, settings, timings))
    return _result(model, recipe, settings, timings)


def _result(model: str, recipe: Recipe, settings: Settings, timings: Sequence[Timing]) -> dict[str, Any]:
    failures = [{"engine": t.engine, "weights": t.weights, "failure": t.failure} for t in timings if t.failure]
    return {"model": model, "recipe": recipe.name, "settings": asdict(settings), "rows": rows(timings), "failures": failures}


def rows(timings: Sequence[Timing]) -> list[dict[str, Any]]:
    """One row per case and pair, with speeds and ratios; see `benchmark_decoding`."""
    found = []
    for timing in timings:
        for pair, step_ms in timing.steps_ms.items():
            beside = {other.weights: other.steps_ms[pair] for other in timings if other.engine == timing.engine and pair in other.steps_ms}
            peers = [beside[kind] for kind in PEERS if kind in beside]
            batch, tokens = (int(part) for part in pair.split("/"))
            speed = 1e3 / step_ms
            found.append(
                {
                    "engine": timing.engine, "weights": timing.weights, "batch": batch, "tokens": tokens, "step_ms": step_ms,
                    "decode_speed": speed, "throughput": speed * batch,
                    "to_fp16": beside["fp16"] / step_ms if "fp16" in beside else None,
                    "to_best_peer": min(peers) / step_ms if peers else None,
                    "details": timing.details,
                }
            )  # fmt: skip
    return found


def peer_group_size(architecture: Architecture, largest: int) -> int:
    """Largest group of 128, 64 or 32 channels, up to `largest`, that divides the inputs of every layer: peers know no shorter last group."""
    width = math.gcd(*(architecture.width(site) for site in SITES))
    for size in (128, 64, 32):
        if size <= largest and width % size == 0:
            return size
    raise ValueError(f"no group of 128, 64 or 32 channels divides the inputs of all layers ({width}), so W4A16 cannot be timed")


def _case(engine: str, kind: str, model: str, recipe: Recipe, settings: Settings, scratch: Path) -> Case:
    if kind == "rosaq" and Path(model).is_dir() and is_checkpoint(model):
        return Case(engine, kind, str(model), dummy=False)
    config = shape_config(model)
    config.dtype = getattr(torch, settings.dtype)
    if kind == "rosaq":
        config = dummy_config(config, recipe, config.dtype)
    elif kind in PEERS:
        group = peer_group_size(Architecture.of(config), recipe.group_size)
        scheme = {"num_bits": 4, "type": "int", "symmetric": True, "group_size": group, "strategy": "group", "dynamic": False, "actorder": None}
        config.quantization_config = {
            "quant_method": "compressed-tensors", "format": "pack-quantized", "quantization_status": "compressed", "ignore": ["lm_head"],
            "config_groups": {"group_0": {"targets": ["Linear"], "weights": scheme, "input_activations": None, "output_activations": None}},
        }  # fmt: skip
    folder = scratch / f"{engine}-{kind}"
    config.save_pretrained(folder)
    return Case(engine, kind, str(folder))


def _timed(cases: Sequence[Case], settings: Settings, scratch: Path) -> Iterator[Timing]:
    """Start cases together, then time one after the other."""
    runs = [Run(case, settings, scratch) for case in cases]
    try:
        for run in runs:
            run.wait_until_ready()
        for run in runs:
            yield run.time()
    finally:
        for run in runs:
            if run.process.poll() is None:
                run.process.terminate()


class Run:
    """One case in a process of its own, which prepares at once and times when it is told to.

    What it prints goes to a file, which tells of the kernel and of errors.
    """

    def __init__(self, case: Case, settings: Settings, scratch: Path) -> None:
        """Start the process."""
        self.case = case
        job, self.result, self.log, self.ready, self.turn = (
            scratch / f"{case.engine}-{case.weights}.{end}" for end in ("job", "json", "log", "ready", "turn")
        )
        job.write_text(json.dumps({"case": asdict(case), "settings": asdict(settings), "ready": str(self.ready), "turn": str(self.turn)}))
        disabled, self.wanted = PEERS.get(case.weights, ("", None))
        environment = {**os.environ, **({"VLLM_DISABLED_KERNELS": disabled} if disabled else {})}
        command = [sys.executable, "-m", "rosaq.benchmark.decoding_run", str(job), str(self.result)]
        with self.log.open("w") as output:
            self.process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, env=environment)

    def wait_until_ready(self) -> None:
        """Return when the model can be timed, or the process has ended."""
        while not self.ready.exists() and self.process.poll() is None:
            time.sleep(0.1)

    def time(self) -> Timing:
        """Let it time, and read what it found."""
        self.turn.touch()
        code = self.process.wait()
        text = self.log.read_text(errors="replace")
        timing = Timing(self.case.engine, self.case.weights)
        if code or not self.result.is_file():
            errors = [line.strip() for line in text.splitlines() if re.search(r"^\S*(Error|Exception)\b|\b\w+Error: ", line.strip())]
            return replace(timing, failure=errors[-1] if errors else f"exit code {code}: {text[-500:]}")
        found = json.loads(self.result.read_text())
        if self.case.engine == "vllm" and self.case.weights in PEERS:
            kernels = sorted(set(re.findall(r"Using (\w+) for CompressedTensorsWNA16", text)))
            found["details"]["kernel"] = ", ".join(kernels)
            if self.wanted is not None and kernels != [self.wanted]:
                return replace(timing, failure=f"vLLM took {', '.join(kernels) or 'an unknown kernel'} and not {self.wanted}")
        return replace(timing, **found)
