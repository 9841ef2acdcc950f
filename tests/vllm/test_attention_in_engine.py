"""Rosaq's attention in a vLLM engine, on the CPU in Triton's interpreter, against transformers on the same checkpoint; see `attention_run.py`.

Prompts of unequal lengths, more of them than may run at once and one longer than a step may be, so that sequences join while others decode, and end
in the middle of pages. Greedy tokens must be transformers' but for ties, and their log-probabilities equal.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from rosaq import load_recipe, quantize

sys.path.insert(0, str(Path(__file__).parents[1]))

from attention_cases import EightBits

pytestmark = pytest.mark.vllm
ROOT = Path(__file__).resolve().parents[2]
LENGTHS, NEW_TOKENS = (17, 5, 33, 1), 6
OPTIONS = dict(dtype="float16", block_size=16, max_num_seqs=3, max_num_batched_tokens=24, max_model_len=64, kv_cache_memory_bytes=1 << 22)
TRITON = next(ROOT.glob(f".venv/lib/python3.{sys.version_info.minor}/site-packages/triton"), None)  # vLLM's environment for the CPU has none


# query heads, key-value heads, vLLM's name of the cache's type, whether there is FlashAttention for prompts -> largest and mean difference of
# log-probabilities; eight bits may round either way
CASES = {
    (2, 2, "auto", False): (0.005, 0.002),
    (2, 2, "fp8", False): (0.05, 0.008),
    (4, 1, "fp8", True): (0.02, 0.008),
    (4, 1, "auto", True): (0.005, 0.002),
}


@pytest.mark.skipif(TRITON is None or torch.cuda.is_available(), reason="needs vLLM's CPU build, and Triton in .venv (make setup)")
def test_decoding_equals_transformers(saved, tmp_path):
    generator = torch.Generator().manual_seed(0)
    prompts = [torch.randint(3, 97, (length,), generator=generator).tolist() for length in LENGTHS]
    recipe, text, jobs = load_recipe("rosaq-nearest").replace(group_size=16, salient=16, salient_per_head=4), torch.arange(3, 67).view(2, 32), []
    for heads, key_heads, cache, flash in CASES:
        folder = tmp_path / f"{heads}-{key_heads}"
        if not folder.is_dir():
            quantize(str(saved("llama", num_attention_heads=heads, num_key_value_heads=key_heads, head_dim=64)), folder, recipe, text, "cpu")
        options = {**OPTIONS, "kv_cache_dtype": cache}
        jobs.append({"folder": str(folder), "flash": flash, "new_tokens": NEW_TOKENS, "prompts": prompts, "options": options})
    for case, job, reply in zip(CASES, jobs, in_engine(jobs, tmp_path), strict=True):
        calls = reply["calls"]  # of 2 layers each, in several steps
        assert calls["rosaq"] >= 8 and calls["flash" if case[3] else "vllm"] >= 6 and not calls["vllm" if case[3] else "flash"], (case, calls)
        model = AutoModelForCausalLM.from_pretrained(job["folder"], dtype=torch.float32).eval()
        apart, below = [], []
        for prompt, tokens, logprobs in zip(prompts, reply["tokens"], reply["logprobs"], strict=True):
            with torch.inference_mode():
                logits = model(torch.tensor([prompt + tokens]), past_key_values=EightBits() if "fp8" in case else None).logits
            expected = logits[0, len(prompt) - 1 : -1].log_softmax(-1)
            chosen = expected.gather(1, torch.tensor(tokens)[:, None])[:, 0]
            apart.append((chosen - torch.tensor(logprobs)).abs())
            below.append(expected.max(-1).values - chosen)
        largest, mean = CASES[case]
        assert torch.cat(apart).max() < largest and torch.cat(apart).mean() < mean, (case, apart)
        assert torch.cat(below).max() < largest, (case, below)


def in_engine(jobs, folder):
    """What `attention_run.py` makes of jobs."""
    (folder / "site").mkdir()
    (folder / "site" / "triton").symlink_to(TRITON)
    (folder / "jobs").write_text(json.dumps(jobs))
    environment = {**os.environ, "TRITON_INTERPRET": "1", "VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_NO_USAGE_STATS": "1"}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT / "src"), str(folder / "site")])
    environment.pop("VLLM_CPU_KVCACHE_SPACE", None)
    command = [sys.executable, Path(__file__).with_name("attention_run.py"), folder / "jobs", folder / "results"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]
    return json.loads((folder / "results").read_text())
