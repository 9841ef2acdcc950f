"""A vLLM engine on the CPU whose attention is rosaq's backend: `python attention_run.py JOBS RESULTS`, JSON files; see `test_attention_in_engine.py`.

vLLM takes its own attention on a CPU whatever is asked for, so its choice is replaced. Rosaq's kernel runs in Triton's interpreter; the two Triton
kernels of vLLM's that its backend calls are replaced by the same in PyTorch, since vLLM has no Triton there. All else is the engine's: the scheduler,
pages, slots, the metadata of each step, and the backend's decision who attends.
"""

import json
import math
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

from attention_cases import interpret

CALLS = {"rosaq": 0, "vllm": 0}
FEW = 1  # sequences that vLLM would split over a GPU, instead of as many as an H200 wants


def store(key, value, key_cache, value_cache, slot_mapping, kv_cache_dtype, k_scale, v_scale):  # noqa: PLR0913  (vLLM's)
    """Keys and values of new tokens (tokens, heads, head size), each to its slot."""
    at = slot_mapping[slot_mapping >= 0]
    page, place = at // key_cache.shape[1], at % key_cache.shape[1]
    for new, cache, scale in ((key, key_cache, k_scale), (value, value_cache, v_scale)):
        cache[page, place] = (new[: len(slot_mapping)][slot_mapping >= 0].float() / scale).to(cache.dtype)


def attend_paged(q, k, v, out, cu_seqlens_q, seqused_k, softmax_scale, block_table, k_descale, v_descale, **_):  # noqa: PLR0913  (vLLM's)
    """Causal attention of each sequence's new tokens to all of its own, in float64."""
    CALLS["vllm"] += 1
    group = q.shape[1] // k.shape[2]
    for sequence, total in enumerate(seqused_k.tolist()):
        first, last = cu_seqlens_q[sequence : sequence + 2].tolist()
        keys, values = (
            (cache[block_table[sequence].long()].flatten(0, 1)[:total].double() * scale.flatten()[0]).repeat_interleave(group, 1).transpose(0, 1)
            for cache, scale in ((k, k_descale), (v, v_descale))
        )
        new = last - first
        later = torch.ones(new, total).triu(total - new + 1).bool()
        scores = (softmax_scale * q[first:last].double().transpose(0, 1) @ keys.transpose(1, 2)).masked_fill(later, -math.inf)
        out[first:last] = (scores.softmax(-1) @ values).transpose(0, 1).to(out.dtype)


def counted(kernel):
    def attend(*arguments):
        CALLS["rosaq"] += 1
        kernel(*arguments)

    return attend


def answers(job):
    """Tokens of each prompt, their log-probabilities, and how many layers of steps each side attended in."""
    from vllm import LLM, SamplingParams
    from vllm.distributed import cleanup_dist_env_and_memory
    from vllm.v1.attention.backends import triton_attn

    triton_attn.MIN_LAUNCH_GRID_SIZE_2D = FEW * job["key_heads"]
    CALLS.update(rosaq=0, vllm=0)
    llm = LLM(job["folder"], enforce_eager=True, **job["options"])
    params = SamplingParams(max_tokens=job["new_tokens"], temperature=0, ignore_eos=True, logprobs=0)
    replies = [reply.outputs[0] for reply in llm.generate([{"prompt_token_ids": ids} for ids in job["prompts"]], params)]
    del llm
    cleanup_dist_env_and_memory()
    return {
        "calls": dict(CALLS),
        "tokens": [list(reply.token_ids) for reply in replies],
        "logprobs": [[entry[token].logprob for entry, token in zip(reply.logprobs, reply.token_ids, strict=True)] for reply in replies],
    }


if __name__ == "__main__":
    from vllm.platforms.cpu import CpuPlatform
    from vllm.v1.attention.backends import triton_attn

    interpret()
    from rosaq.kernels import attention

    attention.attend = counted(attention.attend)
    triton_attn.unified_attention, triton_attn.triton_reshape_and_cache_flash = attend_paged, store
    CpuPlatform.get_attn_backend_cls = classmethod(lambda *_, **__: "rosaq.engines.vllm_attention.RosaqAttentionBackend")
    jobs = json.loads(Path(sys.argv[1]).read_text())
    Path(sys.argv[2]).write_text(json.dumps([answers(job) for job in jobs]))
