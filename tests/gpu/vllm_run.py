"""What vLLM makes of prompts, in a process of its own: `python vllm_run.py JOB RESULT`, JSON files; see `test_vllm.py`."""

import json
import sys
from pathlib import Path
from typing import Any


def answers(job: dict[str, Any]) -> list[dict[str, Any]]:
    """Of each prompt: its negative log-likelihood, greedy tokens, and sampled ones with the negative log-likelihood that decoding gave them."""
    from vllm import LLM, SamplingParams

    llm = LLM(job["folder"], **job["options"])
    prompts = [{"prompt_token_ids": ids} for ids in job["prompts"]]
    options = {"max_tokens": job["new_tokens"], "ignore_eos": True}
    greedy = llm.generate(prompts, SamplingParams(temperature=0, prompt_logprobs=0, **options))
    sampled = llm.generate(prompts, [SamplingParams(temperature=1, seed=seed, logprobs=0, **options) for seed in range(len(prompts))])
    return [
        {
            "tokens": list(reply.outputs[0].token_ids),
            "nll": _nll(reply.prompt_logprobs[1:], reply.prompt_token_ids[1:]),
            "sampled": list(other.outputs[0].token_ids),
            "sampled_nll": _nll(other.outputs[0].logprobs, other.outputs[0].token_ids),
        }
        for reply, other in zip(greedy, sampled, strict=True)
    ]


def _nll(entries: Any, tokens: Any) -> float:
    return -sum(entry[token].logprob for entry, token in zip(entries, tokens, strict=True))


if __name__ == "__main__":
    Path(sys.argv[2]).write_text(json.dumps(answers(json.loads(Path(sys.argv[1]).read_text()))))
