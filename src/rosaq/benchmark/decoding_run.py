"""The process of one case of `decoding.py`: `python -m rosaq.benchmark.decoding_run JOB RESULT`, both JSON files."""

import hashlib
import importlib.metadata
import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, StoppingCriteria, StoppingCriteriaList

from rosaq.benchmark.decoding import Case, Settings
from rosaq.clock import peak_memory
from rosaq.engines.dummy import dummy_model
from rosaq.engines.transformers import register
from rosaq.linear import RosaqLinear

SKIPPED = 3  # first steps of a run: the prompts' own, and those in which sequences may still join


def median_step_ms(stamps: list[list[float]]) -> float:
    """Median time between two tokens, over several runs' times of tokens in seconds, in milliseconds."""
    gaps = [after - before for run in stamps for before, after in zip(run[SKIPPED:], run[SKIPPED + 1 :], strict=False)]
    return statistics.median(gaps) * 1e3


def prompts(batch: int, tokens: int, vocabulary: int) -> list[list[int]]:
    """Random token ids, (batch, tokens)."""
    generator = torch.Generator().manual_seed(batch * tokens)
    return torch.randint(5, vocabulary, (batch, tokens), generator=generator).tolist()


def kv_cache_bytes(config: Any, settings: Settings) -> int:
    """What one GPU's keys and values of the largest pair take in vLLM, in whole blocks of 128 tokens and one to spare."""
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    heads = max(1, config.num_key_value_heads // settings.tensor_parallel)
    tokens = max(batch * -(-2 * tokens // 128) * 128 for batch, tokens in settings.pairs) + 128
    return 2 * config.num_hidden_layers * heads * head * tokens * (1 if settings.kv_cache_dtype == "fp8" else 2)


def vllm_options(config: Any, settings: Settings) -> dict[str, Any]:
    """Arguments of `vllm.LLM`: no larger than the pairs need, so that engines may stand side by side."""
    batches, longest = sorted({batch for batch, _ in settings.pairs}), max(tokens for _, tokens in settings.pairs)
    given = dict(settings.vllm_options)
    options: dict[str, Any] = dict(
        skip_tokenizer_init=True, dtype=settings.dtype, kv_cache_dtype=settings.kv_cache_dtype, max_model_len=2 * longest,
        max_num_seqs=max(batches), enforce_eager=settings.eager, enable_prefix_caching=False, tensor_parallel_size=settings.tensor_parallel,
        max_num_batched_tokens=max(2 * longest, *(batch * tokens for batch, tokens in settings.pairs)),
    )  # fmt: skip
    if not settings.eager:
        options["compilation_config"] = {"cudagraph_capture_sizes": batches, **given.pop("compilation_config", {})}
    if torch.cuda.is_available():
        options |= {"gpu_memory_utilization": 0.1, "kv_cache_memory_bytes": kv_cache_bytes(config, settings)}
    return options | given


def time_vllm(case: Case, settings: Settings, turn: Callable[[], None]) -> dict[str, Any]:
    """Steps of vLLM's own engine, all sequences decoding together."""
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    os.environ.setdefault("VLLM_WORKER_MULTIPROC_METHOD", "spawn")  # who has asked torch for a GPU cannot fork for it any more
    if not torch.cuda.is_available():
        os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "2")
    from vllm import LLM, SamplingParams  # noqa: PLC0415  (only in the process that runs it, after the environment is set)

    config = AutoConfig.from_pretrained(case.folder, local_files_only=True, trust_remote_code=False)
    engine = LLM(case.folder, load_format="dummy" if case.dummy else "auto", **vllm_options(config, settings)).llm_engine

    def run(batch: int, tokens: int, generated: int) -> tuple[list[float], dict[str, list[int]]]:
        """Times of tokens in seconds, and the tokens."""
        params = SamplingParams(max_tokens=generated, temperature=0, ignore_eos=True, detokenize=False)
        for index, ids in enumerate(prompts(batch, tokens, config.vocab_size)):
            engine.add_request(f"{index:06d}-{time.monotonic_ns()}", {"prompt_token_ids": ids}, params)
        stamps, found = [], dict[str, list[int]]()
        while engine.has_unfinished_requests():
            replies = engine.step()
            if len(replies) == batch:  # a step of all sequences
                stamps.append(time.perf_counter())
            found |= {reply.request_id[:6]: list(reply.outputs[0].token_ids) for reply in replies if reply.finished}
        return stamps, found

    turn()
    steps, digests = {}, {}
    for batch, tokens in settings.pairs:
        run(batch, tokens, 4)
        runs = [run(batch, tokens, tokens) for _ in range(settings.repeats)]
        steps[f"{batch}/{tokens}"] = median_step_ms([stamps for stamps, _ in runs])
        digests[f"{batch}/{tokens}"] = hashlib.sha256(json.dumps(sorted(runs[-1][1].items())).encode()).hexdigest()[:16]
    return {"steps_ms": steps, "details": {"vllm": importlib.metadata.version("vllm"), "tokens_sha256": digests}}


class _Stamps(StoppingCriteria):
    """Notes the time of every token of `generate` and stops nothing."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **_: Any) -> torch.Tensor:
        if input_ids.is_cuda:
            torch.cuda.synchronize()
        self.times.append(time.perf_counter())
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)


def time_transformers(case: Case, settings: Settings, turn: Callable[[], None]) -> dict[str, Any]:
    """Steps of transformers' `generate`: as it is, or compiled with a static cache."""
    device, dtype = "cuda" if torch.cuda.is_available() else "cpu", getattr(torch, settings.dtype)
    register()
    if case.dummy:
        model = dummy_model(AutoConfig.from_pretrained(case.folder, local_files_only=True, trust_remote_code=False), dtype, device)
    else:
        model = AutoModelForCausalLM.from_pretrained(
            case.folder, dtype=dtype, device_map=device, local_files_only=True, trust_remote_code=False
        ).eval()
    kernels = sorted({module.repack(dtype) for module in model.modules() if isinstance(module, RosaqLinear)})
    options: dict[str, Any] = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    if case.engine == "transformers-compiled":
        options["cache_implementation"] = "static"
        if device == "cpu":  # where `generate` does not compile by itself
            model.forward = torch.compile(model.forward, dynamic=True)

    def run(batch: int, tokens: int, generated: int) -> list[float]:
        ids = torch.tensor(prompts(batch, tokens, model.config.vocab_size), device=device)
        stamps = _Stamps()
        model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=generated, stopping_criteria=StoppingCriteriaList([stamps]), **options
        )
        return stamps.times

    compiled = case.engine == "transformers-compiled"
    steps = {}
    with torch.inference_mode():
        for batch, tokens in settings.pairs if compiled else ():  # compiling is part of the start
            run(batch, tokens, tokens)
        turn()
        for batch, tokens in settings.pairs:
            run(batch, tokens, tokens)  # cuDNN's attention, PyTorch's choice on Hopper, makes a plan for each length that it has not met
            steps[f"{batch}/{tokens}"] = median_step_ms([run(batch, tokens, tokens) for _ in range(settings.repeats)])
    host, accelerator = peak_memory(device)
    memory = {"peak_host_bytes": host, "peak_device_bytes": accelerator}
    return {"steps_ms": steps, "details": {"transformers": importlib.metadata.version("transformers"), "kernel": ", ".join(kernels), **memory}}


def main(job: str, result: str) -> None:
    """Read a job, prepare, wait for the turn, time, and write what `Timing` holds."""
    given, began = json.loads(Path(job).read_text()), time.monotonic()
    settings = Settings(**{**given["settings"], "pairs": tuple(tuple(pair) for pair in given["settings"]["pairs"])})
    case, started = Case(**given["case"]), []

    def turn() -> None:
        started.append(time.monotonic() - began)
        Path(given["ready"]).touch()
        parent = os.getppid()
        while not Path(given["turn"]).exists():
            if os.getppid() != parent:
                sys.exit("the benchmark ended")
            time.sleep(0.05)

    found = (time_vllm if case.engine == "vllm" else time_transformers)(case, settings, turn)
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    found["details"] |= {"torch": torch.__version__, "device": device, "start_s": started[0]}
    Path(result).write_text(json.dumps(found))


if __name__ == "__main__":
    main(*sys.argv[1:])
