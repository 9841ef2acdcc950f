"""A vLLM engine on the CPU whose attention is rosaq's backend: `python attention_run.py JOBS RESULTS`, JSON files; see `test_attention_in_engine.py`.

vLLM takes its own attention on a CPU whatever is asked for, so its choice is replaced. Rosaq's kernel runs in Triton's interpreter; the two Triton
kernels of vLLM's that its backend calls, and FlashAttention where a job has it, are replaced by the same in PyTorch, since vLLM has none of them
there. All else is the engine's: the scheduler, pages, slots, the metadata of each step, and the backend's decision who attends.
"""

import json
import math
import sys
from itertools import pairwise
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

from attention_cases import interpret

CALLS = {"rosaq": 0, "vllm": 0, "flash": 0}


def store(key, value, key_cache, value_cache, slot_mapping, kv_cache_dtype, k_scale, v_scale):  # noqa: PLR0913  (vLLM's)
    """Keys and values of new tokens (tokens, heads, head size), each to its slot."""
    at = slot_mapping[slot_mapping >= 0]
    page, place = at // key_cache.shape[1], at % key_cache.shape[1]
    for new, cache, scale in ((key, key_cache, k_scale), (value, value_cache, v_scale)):
        cache[page, place] = (new[: len(slot_mapping)][slot_mapping >= 0].float() / scale).to(cache.dtype)


def attend_to(q, keys, values, scale, out):
    """Causal attention of a sequence's last tokens (tokens, heads, head size) to all of its own, in float64."""
    keys, values = (states.double().repeat_interleave(q.shape[1] // states.shape[1], 1).transpose(0, 1) for states in (keys, values))
    later = torch.ones(len(q), keys.shape[1]).triu(keys.shape[1] - len(q) + 1).bool()
    scores = (scale * q.double().transpose(0, 1) @ keys.transpose(1, 2)).masked_fill(later, -math.inf)
    out.copy_((scores.softmax(-1) @ values).transpose(0, 1))


def attend_paged(q, k, v, out, cu_seqlens_q, seqused_k, softmax_scale, block_table, k_descale, v_descale, **_):  # noqa: PLR0913  (vLLM's)
    """Attention of each sequence's new tokens over a paged cache."""
    CALLS["vllm"] += 1
    for sequence, total in enumerate(seqused_k.tolist()):
        first, last = cu_seqlens_q[sequence : sequence + 2].tolist()
        keys, values = (
            cache[block_table[sequence].long()].flatten(0, 1)[:total].double() * scale.flatten()[0]
            for cache, scale in ((k, k_descale), (v, v_descale))
        )
        attend_to(q[first:last], keys, values, softmax_scale, out[first:last])


def flash(q, k, v, out, cu_seqlens_q, **how):
    """What FlashAttention makes of the arguments that the backend gives it: keys and values in pages, or of one sequence after the other."""
    CALLS["flash"] += 1
    assert how["causal"] and how["fa_version"] == 3 and ("block_table" in how) == ("seqused_k" in how) != ("cu_seqlens_k" in how)
    assert q.dtype == k.dtype == v.dtype and len(q) == cu_seqlens_q[-1]
    for sequence, (first, last) in enumerate(pairwise(cu_seqlens_q.tolist())):
        if "cu_seqlens_k" in how:
            begin, end = how["cu_seqlens_k"][sequence : sequence + 2].tolist()
            keys, values = k[begin:end], v[begin:end]
        else:
            keys, values = (cache[how["block_table"][sequence].long()].flatten(0, 1)[: how["seqused_k"][sequence]] for cache in (k, v))
        assert last - first <= how["max_seqlen_q"] and len(keys) <= how["max_seqlen_k"]
        attend_to(q[first:last], keys, values, how["softmax_scale"], out[first:last])


def counted(kernel):
    def attend(*arguments):
        CALLS["rosaq"] += 1
        kernel(*arguments)

    return attend


def answers(job):
    """Tokens of each prompt, their log-probabilities, and how many layers of steps each side attended in."""
    from vllm import LLM, SamplingParams
    from vllm.distributed import cleanup_dist_env_and_memory

    from rosaq.engines import vllm_attention

    vllm_attention.flash_attention = lambda: flash if job["flash"] else None
    CALLS.update(rosaq=0, vllm=0, flash=0)
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
