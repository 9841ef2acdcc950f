"""What vLLM makes of prompts, in a process of its own: `python vllm_run.py JOB RESULT`, JSON files; see `test_vllm.py`."""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from vllm import LLM, SamplingParams
from vllm.v1.sample.logits_processor import AdapterLogitsProcessor


class Forced(AdapterLogitsProcessor):
    """Lets a request answer with the tokens of its `forced` only; vLLM's log-probabilities are of the logits before that."""

    def is_argmax_invariant(self) -> bool:
        """It is not, so greedy requests meet it, too."""
        return False

    def new_req_logits_processor(self, params: SamplingParams) -> Callable[[list[int], torch.Tensor], torch.Tensor] | None:
        """What a request's logits become, given its answer so far."""
        forced = (params.extra_args or {}).get("forced")

        def only(answer: list[int], logits: torch.Tensor) -> torch.Tensor:
            left = torch.full_like(logits, float("-inf"))
            left[forced[min(len(answer), len(forced) - 1)]] = 0
            return left

        return only if forced else None


def answers(job: dict[str, Any]) -> list[dict[str, Any]]:
    """Of each prompt: its negative log-likelihood, greedy tokens, and, where the job has `forced`, that of so many last tokens by decoding."""
    last, options = job.get("forced", 0), {"temperature": 0, "ignore_eos": True}
    llm = LLM(job["folder"], **job["options"], **(dict(logits_processors=["vllm_run:Forced"], async_scheduling=False) if last else {}))
    prompts = [{"prompt_token_ids": ids} for ids in job["prompts"]]
    greedy = llm.generate(prompts, SamplingParams(max_tokens=job["new_tokens"], prompt_logprobs=0, **options))
    found = [{"tokens": list(reply.outputs[0].token_ids), "nll": _nll(reply.prompt_logprobs[1:], reply.prompt_token_ids[1:])} for reply in greedy]
    if last:
        wanted = [SamplingParams(max_tokens=last, logprobs=0, extra_args={"forced": ids[-last:]}, **options) for ids in job["prompts"]]
        for entry, reply, params in zip(
            found, llm.generate([{"prompt_token_ids": ids[:-last]} for ids in job["prompts"]], wanted), wanted, strict=True
        ):
            said = list(reply.outputs[0].token_ids)
            if said != params.extra_args["forced"]:
                raise RuntimeError(f"vLLM was to answer {params.extra_args['forced'][:8]} ..., and answered {said[:8]} ...")
            entry["decoded_nll"] = _nll(reply.outputs[0].logprobs, said)
    return found


def _nll(entries: Any, tokens: Any) -> float:
    return -sum(entry[token].logprob for entry, token in zip(entries, tokens, strict=True))


if __name__ == "__main__":
    Path(sys.argv[2]).write_text(json.dumps(answers(json.loads(Path(sys.argv[1]).read_text()))))
