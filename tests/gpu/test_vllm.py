"""vLLM on a CUDA GPU, with CUDA graphs and its compiler, against transformers on the same checkpoint.

The environment variable ROSAQ_TEST_CHECKPOINT names the folder of a quantized model with its tokenizer. Perplexity is that of this
repository's own pages and sources, in windows of 512 tokens; with rosaq's attention the last 128 of each window are decoded, too, one by one.
Greedy tokens are compared as `tests/vllm/test_serving.py` does it. Where vLLM's cache has 8 bits, transformers' is rounded to them, too: that alone
makes log-probabilities differ by 0.09 (root of the mean square), so a perplexity takes thousands of tokens to be known to 0.1 %.
Cases take little memory, so that several can run side by side on one GPU.
"""

import copy
import json
import math
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

from rosaq import Recipe, quantize
from rosaq.engines.loading import load_model
from rosaq.engines.serving import vllm_installed

sys.path.insert(0, str(Path(__file__).parents[1]))

from attention_cases import EightBits

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(1200)]
ROOT = Path(__file__).resolve().parents[2]
WINDOW, WINDOWS, DECODED = 512, 64, 128
ANSWERS, NEW_TOKENS = 20, 64
GRAPHS = {"max_num_seqs": 64, "compilation_config": {"cudagraph_capture_sizes": [1, 4, 16, 32, 64]}}  # few, so that an engine starts soon


@dataclass(frozen=True)
class Case:
    """Options of vLLM; the relative difference of perplexity, the gap of logits below the largest and the share of tokens that may be ties;
    and the model's heads: "even" in number, or each with keys and values of its "own"."""

    options: dict[str, Any]
    perplexity: float = 0.005
    gap: float = 0.25
    ties: float = 0.05
    heads: str = ""


FP8 = dict(kv_cache_dtype="fp8")
OURS = dict(dtype="float16", attention_backend="CUSTOM")
CASES = {
    "float16": Case(dict(dtype="float16")),
    "bfloat16": Case(dict(dtype="bfloat16"), gap=1.0, ties=0.1),
    "fp8-cache": Case(dict(dtype="bfloat16", **FP8), 0.05, 4.0, 0.3),
    "eager": Case(dict(dtype="float16", enforce_eager=True)),
    "our-attention": Case(OURS | FP8, gap=1.0, ties=0.1),
    "our-attention-own-keys": Case(OURS | FP8, gap=1.0, ties=0.1, heads="own"),
    "our-attention-16-bits": Case(OURS),
    "our-attention-16-bits-own-keys": Case(OURS, heads="own"),
    "our-attention-chunks": Case(
        OURS | FP8 | dict(max_num_batched_tokens=640, enable_prefix_caching=True), gap=1.0, ties=0.1
    ),  # prompts after what is cached
    "two-gpus": Case(dict(dtype="float16", tensor_parallel_size=2), heads="even"),
}


@pytest.fixture(scope="module")
def checkpoint():
    folder = os.environ.get("ROSAQ_TEST_CHECKPOINT")
    if not folder or not vllm_installed():
        pytest.skip("needs vLLM, and a checkpoint named by ROSAQ_TEST_CHECKPOINT")
    return Path(folder)


def text_windows(checkpoint):
    files = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").glob("*.md")), *sorted((ROOT / "src").rglob("*.py"))]
    text = "\n\n".join(file.read_text() for file in files)
    ids = AutoTokenizer.from_pretrained(checkpoint)(text, add_special_tokens=False, return_tensors="pt").input_ids[0]
    assert len(ids) >= WINDOW * WINDOWS
    return ids[: WINDOW * WINDOWS].view(WINDOWS, WINDOW)


def with_heads(heads, checkpoint, windows, folder):
    """The checkpoint's model with other heads, which computes the same, quantized anew by its recipe.

    "even": where the number is odd, one more key-value head whose outputs nobody reads, so that two GPUs can share them.
    "own": each query head has a copy of its keys and values.
    """
    model, tokenizer = load_model(str(checkpoint), "cpu", "float16", weights="dense")
    config, size = copy.deepcopy(model.config), model.config.head_dim
    group, tensors = config.num_attention_heads // config.num_key_value_heads, model.state_dict()
    if heads == "even" and config.num_key_value_heads % 2:
        config.num_attention_heads, config.num_key_value_heads = config.num_attention_heads + group, config.num_key_value_heads + 1
        for name, tensor in tensors.items():
            for role, more in (("q_proj", group), ("k_proj", 1), ("v_proj", 1), ("o_proj", -group)):
                if role in name:
                    tensors[name] = torch.nn.functional.pad(tensor, [0, 0, 0, more * size] if more > 0 else [0, -more * size])
    elif heads == "own" and group > 1:
        for name, tensor in tensors.items():
            if "k_proj" in name or "v_proj" in name:
                tensors[name] = tensor.unflatten(0, (-1, size)).repeat_interleave(group, 0).flatten(0, 1)
        config.num_key_value_heads = config.num_attention_heads
    else:
        return checkpoint
    recipe = Recipe.from_dict(json.loads((checkpoint / "config.json").read_text())["quantization_config"]["recipe"])
    changed = LlamaForCausalLM(config).half()
    changed.load_state_dict(tensors)
    changed.save_pretrained(folder / heads)
    tokenizer.save_pretrained(folder / heads)
    quantize(str(folder / heads), folder / f"{heads}-rosaq", recipe, windows, "cuda")
    return folder / f"{heads}-rosaq"


def job_of(case, checkpoint, windows):
    """What `vllm_run.py` is to do."""
    options = {"max_model_len": WINDOW + NEW_TOKENS, "gpu_memory_utilization": 0.03, "kv_cache_memory_bytes": 3 << 30, **GRAPHS, **case.options}
    if case.options.get("enforce_eager"):
        del options["compilation_config"]
    job = {"folder": str(checkpoint), "options": options, "prompts": windows.tolist(), "new_tokens": NEW_TOKENS}
    return job | ({"forced": DECODED} if "attention_backend" in case.options else {})


def check(name, case, checkpoint, windows, found):
    """Hold vLLM's answers to transformers'."""
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=getattr(torch, case.options["dtype"]), device_map="cuda").eval()

    def logits_of(tokens):
        cache = EightBits() if case.options.get("kv_cache_dtype") == "fp8" else None
        with torch.inference_mode():
            return model(tokens[None].cuda(), past_key_values=cache).logits[0, :-1].float()

    text, decoded, below = 0.0, 0.0, []
    for window in windows:
        nll = torch.nn.functional.cross_entropy(logits_of(window), window[1:].cuda(), reduction="none")
        text, decoded = text + float(nll.sum()), decoded + float(nll[-DECODED:].sum())
    for prompt, entry in zip(windows[:ANSWERS], found, strict=False):
        tokens = torch.tensor(entry["tokens"])
        answers = logits_of(torch.cat([prompt, tokens]))[WINDOW - 1 :].cpu()
        below += (answers.max(-1).values - answers.gather(1, tokens[:, None])[:, 0])[answers.argmax(-1) != tokens].tolist()
    count = NEW_TOKENS * min(ANSWERS, len(found))
    figures = [(sum(entry["nll"] for entry in found), text, len(found) * (WINDOW - 1))]
    if "decoded_nll" in found[0]:
        figures.append((sum(entry["decoded_nll"] for entry in found), decoded, len(found) * DECODED))
    pairs = [(math.exp(theirs / n), math.exp(ours / n)) for theirs, ours, n in figures]
    said = ", decoding ".join(f"{served:.4f} served, {expected:.4f} in transformers" for served, expected in pairs)
    print(f"{name}: perplexity {said}; {len(below)} of {count} tokens differ, by up to {max(below, default=0.0):.3f}", flush=True)
    for served, expected in pairs:
        assert abs(served / expected - 1) < case.perplexity
    assert len(below) <= case.ties * count and max(below, default=0.0) < case.gap


@pytest.mark.parametrize("name", list(CASES))
def test_perplexity_and_greedy_tokens_equal_transformers(checkpoint, name, tmp_path):
    case, windows = CASES[name], text_windows(checkpoint)
    if torch.cuda.device_count() < case.options.get("tensor_parallel_size", 1):
        pytest.skip("needs two GPUs")
    if case.heads:
        checkpoint = with_heads(case.heads, checkpoint, windows, tmp_path)
    (tmp_path / "job").write_text(json.dumps(job_of(case, checkpoint, windows)))
    done = subprocess.run(
        [sys.executable, Path(__file__).with_name("vllm_run.py"), tmp_path / "job", tmp_path / "result"], capture_output=True, text=True,
        env={**os.environ, "VLLM_CACHE_ROOT": str(tmp_path / "vllm"), "TRITON_CACHE_DIR": str(tmp_path / "triton")},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]
    check(name, case, checkpoint, windows, json.loads((tmp_path / "result").read_text()))
    ours = "attention_backend" in case.options
    assert bool([*tmp_path.rglob("attend_*.cubin")]) == ours  # Triton compiled rosaq's kernel, so it ran
