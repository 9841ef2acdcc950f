"""What vLLM makes of prompts, in a process of its own: `python vllm_run.py JOB RESULT`, JSON files; see `test_vllm.py`."""

import json
import sys
from pathlib import Path

if __name__ == "__main__":
    from vllm import LLM, SamplingParams

    job = json.loads(Path(sys.argv[1]).read_text())
    llm = LLM(job["folder"], **job["options"])
    prompts = [{"prompt_token_ids": ids} for ids in job["prompts"]]
    replies = llm.generate(prompts, SamplingParams(max_tokens=job["new_tokens"], temperature=0, ignore_eos=True, prompt_logprobs=0))
    found = [
        {
            "tokens": list(reply.outputs[0].token_ids),
            "nll": -sum(entry[token].logprob for entry, token in zip(reply.prompt_logprobs[1:], reply.prompt_token_ids[1:], strict=True)),
        }
        for reply in replies
    ]
    Path(sys.argv[2]).write_text(json.dumps(found))
