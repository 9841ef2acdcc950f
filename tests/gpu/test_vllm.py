"""vLLM on a CUDA GPU, with CUDA graphs and its compiler, against transformers on the same checkpoint.

The environment variable ROSAQ_TEST_CHECKPOINT names the folder of a quantized model with its tokenizer. Perplexity is that of this
repository's own pages and sources, in windows of 512 tokens; greedy tokens are compared as `tests/vllm/test_serving.py` does it.
Cases take little memory, so that several can run side by side on one GPU.
"""

import copy
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

from rosaq import Recipe, quantize
from rosaq.engines.loading import load_model
from rosaq.engines.serving import vllm_installed

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(1200)]
ROOT = Path(__file__).resolve().parents[2]
WINDOW, WINDOWS, NEW_TOKENS = 512, 20, 64
MANY = 3  # times that each prompt is asked where CUSTOM attends: few sequences at once it leaves to vLLM's kernel
# type, KV cache, GPUs -> relative difference of perplexity, gap of logits below the largest, share of tokens that may be ties
CASES = {
    "float16": (dict(dtype="float16"), 0.005, 0.25, 0.05),
    "bfloat16": (dict(dtype="bfloat16"), 0.005, 1.0, 0.1),
    "fp8-cache": (dict(dtype="bfloat16", kv_cache_dtype="fp8"), 0.05, 4.0, 0.3),
    "eager": (dict(dtype="float16", enforce_eager=True), 0.005, 0.25, 0.05),
    "our-attention": (dict(dtype="float16", attention_backend="CUSTOM", kv_cache_dtype="fp8"), 0.05, 4.0, 0.3),
    "two-gpus": (dict(dtype="float16", tensor_parallel_size=2), 0.005, 0.25, 0.05),
}


@pytest.fixture(scope="module")
def checkpoint():
    folder = os.environ.get("ROSAQ_TEST_CHECKPOINT")
    if not folder or not vllm_installed():
        pytest.skip("needs vLLM, and a checkpoint named by ROSAQ_TEST_CHECKPOINT")
    return Path(folder)


@pytest.fixture(scope="module")
def windows(checkpoint):
    files = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").glob("*.md")), *sorted((ROOT / "src").rglob("*.py"))]
    text = "\n\n".join(file.read_text() for file in files)
    ids = AutoTokenizer.from_pretrained(checkpoint)(text, add_special_tokens=False, return_tensors="pt").input_ids[0]
    assert len(ids) >= WINDOW * WINDOWS
    return ids[: WINDOW * WINDOWS].view(WINDOWS, WINDOW)


def with_even_heads(checkpoint, windows, folder):
    """A checkpoint whose heads two GPUs can share: where the number is odd, one more key-value head whose outputs nobody reads."""
    model, tokenizer = load_model(str(checkpoint), "cpu", "float16", weights="dense")
    config, size = copy.deepcopy(model.config), model.config.head_dim
    if config.num_key_value_heads % 2 == 0:
        return checkpoint
    recipe = Recipe.from_dict(json.loads((checkpoint / "config.json").read_text())["quantization_config"]["recipe"])
    group = config.num_attention_heads // config.num_key_value_heads
    config.num_attention_heads, config.num_key_value_heads = config.num_attention_heads + group, config.num_key_value_heads + 1
    tensors = model.state_dict()
    for name, tensor in tensors.items():
        for role, heads in (("q_proj", group), ("k_proj", 1), ("v_proj", 1), ("o_proj", -group)):
            if role in name:
                padding = [0, 0, 0, heads * size] if heads > 0 else [0, -heads * size]
                tensors[name] = torch.nn.functional.pad(tensor, padding)
    even = LlamaForCausalLM(config).half()
    even.load_state_dict(tensors)
    even.save_pretrained(folder / "even")
    tokenizer.save_pretrained(folder / "even")
    quantize(str(folder / "even"), folder / "even-rosaq", recipe, windows, "cuda")
    return folder / "even-rosaq"


@pytest.mark.parametrize("case", list(CASES))
def test_perplexity_and_greedy_tokens_equal_transformers(checkpoint, windows, case, tmp_path):
    options, tolerance, gap, ties = CASES[case]
    ranks = options.get("tensor_parallel_size", 1)
    if torch.cuda.device_count() < ranks:
        pytest.skip("needs two GPUs")
    if ranks > 1:
        checkpoint = with_even_heads(checkpoint, windows, tmp_path)
    options = {"max_model_len": WINDOW + NEW_TOKENS, "gpu_memory_utilization": 0.1, "kv_cache_memory_bytes": 1 << 30, **options}
    prompts = windows.tolist() * (MANY if "attention_backend" in options else 1)
    job = {"folder": str(checkpoint), "options": options, "prompts": prompts, "new_tokens": NEW_TOKENS}
    (tmp_path / "job").write_text(json.dumps(job))
    done = subprocess.run(
        [sys.executable, Path(__file__).with_name("vllm_run.py"), tmp_path / "job", tmp_path / "result"], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]
    found = json.loads((tmp_path / "result").read_text())[:WINDOWS]
    generated = torch.tensor([entry["tokens"] for entry in found])
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=getattr(torch, options["dtype"]), device_map="cuda").eval()
    nll, below = 0.0, []
    for prompt, tokens in zip(windows, generated, strict=True):
        with torch.inference_mode():
            logits = model(torch.cat([prompt, tokens])[None].cuda()).logits[0, :-1].float().cpu()
        nll += float(torch.nn.functional.cross_entropy(logits[: WINDOW - 1], prompt[1:], reduction="sum"))
        answers = logits[WINDOW - 1 :]
        below += (answers.max(-1).values - answers.gather(1, tokens[:, None])[:, 0])[answers.argmax(-1) != tokens].tolist()
    count = WINDOWS * (WINDOW - 1)
    served, expected = math.exp(sum(entry["nll"] for entry in found) / count), math.exp(nll / count)
    print(f"{case}: perplexity {served:.4f} served, {expected:.4f} in transformers; {len(below)} of {generated.numel()} tokens differ, by up to "
          f"{max(below, default=0.0):.3f}")  # fmt: skip
    assert abs(served / expected - 1) < tolerance
    assert len(below) <= ties * generated.numel() and max(below, default=0.0) < gap
