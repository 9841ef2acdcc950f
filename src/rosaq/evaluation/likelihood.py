"""A loaded model as lm-evaluation-harness asks for it, at a fraction of the work.

The harness's own wrapper, `HFLM`, decides what is tokenized, how, and where context and continuation part; here strings
are tokenized in one call, requests that feed the model the same tokens (the four letters of MMLU) run once, batches
are filled by tokens, and lm_head runs on the tokens of the continuations only. Log-softmax is in float32 whatever the
model's type; in float32 the figures are HFLM's own. R rows, T tokens, C scored tokens, D hidden, V vocabulary.
"""

from array import array
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain
from typing import Any

import torch
from lm_eval.models.huggingface import HFLM

from rosaq.clock import Progress
from rosaq.evaluation.perplexity import LOGITS_BYTES

BATCH_TOKENS = {"cuda": 32768, "cpu": 4096}
Scored = tuple[float, bool]  # log-likelihood of the continuation, and whether it is what greedy decoding would give
Encoded = tuple[tuple[str, str], list[int], list[int]]  # the harness's request: its strings, context, continuation


class LikelihoodModel(HFLM):
    """Log-likelihoods of continuations by a causal language model that is loaded already.

    Args:
        model: transformers model, plain or with quantized layers, on its device, in evaluation mode.
        tokenizer: its tokenizer.
        batch_tokens: padded tokens per forward pass; by default 32768 on a GPU and 4096 on the CPU.
        progress: told of the requests done.
        ids: token ids of strings, which another model with this tokenizer may have left and to which new ones are added.
    """

    def __init__(self, model: Any, tokenizer: Any, batch_tokens: int | None, progress: Progress, ids: "dict[str, array[int]] | None" = None) -> None:
        """Wrap; nothing is loaded or moved."""
        super().__init__(pretrained=model, tokenizer=tokenizer, backend="causal")
        self._batch_tokens = batch_tokens or BATCH_TOKENS.get(model.device.type, BATCH_TOKENS["cuda"])
        self._progress = progress
        self._ids = {} if ids is None else ids

    def loglikelihood(self, requests: list[Any], disable_tqdm: bool = True) -> list[Scored]:
        """Score the harness's requests; every string that it will tokenize is tokenized at once before."""
        texts = {text for context, continuation in (request.args for request in requests) for text in (context.rstrip(), context + continuation)}
        bos = self.tokenizer.decode(self.prefix_token_id)  # a text that begins with it is tokenized differently: left to the harness
        plain = [text for text in texts if text and text not in self._ids and not text.startswith(bos)]
        if plain:
            special = {} if self.add_bos_token is None else {"add_special_tokens": self.add_bos_token}
            encoded = self.tokenizer(plain, verbose=False, **special)["input_ids"]
            self._ids.update((text, array("i", ids)) for text, ids in zip(plain, encoded, strict=True))
        return super().loglikelihood(requests, disable_tqdm=True)

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, left_truncate_len: int | None = None, **rest: Any) -> list[int]:
        """Token ids of a string: looked up, or tokenized by the harness's own rule."""
        if add_special_tokens is None and left_truncate_len is None and string in self._ids:
            return self._ids[string].tolist()
        return super().tok_encode(string, add_special_tokens, left_truncate_len, **rest)

    @torch.inference_mode()
    def _loglikelihood_tokens(self, requests: list[Encoded], disable_tqdm: bool = True, override_bs: int | None = None) -> list[Scored]:
        askers: dict[tuple[int, ...], list[int]] = {}  # input of the model -> requests that it answers
        for index, (_, context, continuation) in enumerate(requests):
            assert 0 < len(continuation) <= self.max_length and context
            askers.setdefault(tuple((context + continuation)[-(self.max_length + 1) : -1]), []).append(index)
        found: list[Scored | None] = [None] * len(requests)
        done = 0
        for rows in self._batches(sorted(askers, key=len, reverse=True)):
            owners = [(row, index) for row, ids in enumerate(rows) for index in askers[ids]]
            scores = self._score(rows, [(row, requests[index][2]) for row, index in owners])
            for (_, index), score in zip(owners, scores, strict=True):
                found[index] = score
            done += len(owners)
            self._progress("zero-shot", done, len(requests))
        answers = [score for score in found if score is not None]
        assert len(answers) == len(requests)
        return answers

    def _batches(self, inputs: Sequence[tuple[int, ...]]) -> Iterator[Sequence[tuple[int, ...]]]:
        """Inputs, the longest first, as many at a time as their padded tokens allow."""
        start = 0
        while start < len(inputs):
            count = max(1, self._batch_tokens // len(inputs[start]))
            yield inputs[start : start + count]
            start += count

    def _score(self, rows: Sequence[tuple[int, ...]], continuations: list[tuple[int, list[int]]]) -> list[Scored]:
        """Scores of continuations (row, its tokens), each of which ends one token after its row."""
        width = len(rows[0])
        padded = ((*row, *[0] * (width - len(row))) for row in rows)  # what follows a row does not change it
        ids_RT = _vector(chain.from_iterable(padded)).view(-1, width)
        ends = [(row * width + len(rows[row]), len(tokens)) for row, tokens in continuations]
        places_C = _vector(chain.from_iterable(range(end - count, end) for end, count in ends)).to(self.device)
        targets_C = _vector(chain.from_iterable(tokens for _, tokens in continuations)).to(self.device)
        hidden_RTD = self.model.get_decoder()(input_ids=ids_RT.to(self.device), use_cache=False).last_hidden_state
        hidden_CD = hidden_RTD.flatten(0, 1)[places_C]
        chances, greedy = [], []
        step = max(1, LOGITS_BYTES // (4 * self.model.config.vocab_size))
        for part_CD, wanted_C in zip(hidden_CD.split(step), targets_C.split(step), strict=True):
            logits_CV = self.model.get_output_embeddings()(part_CD).float()
            chances.append(logits_CV.gather(1, wanted_C[:, None])[:, 0] - logits_CV.logsumexp(1))
            greedy.append(logits_CV.argmax(1) == wanted_C)
        chances_C, greedy_C = torch.cat(chances).cpu(), torch.cat(greedy).cpu()
        if not torch.isfinite(chances_C).all():
            raise ValueError("the model's logits hold NaN or Inf; try --dtype float32")
        lengths = [len(tokens) for _, tokens in continuations]
        return [(float(a.sum()), bool(b.all())) for a, b in zip(chances_C.split(lengths), greedy_C.split(lengths), strict=True)]


def _vector(values: Iterable[int]) -> torch.Tensor:
    """Whole numbers as a tensor, many times as fast as `torch.tensor`, which a million tokens would wait for."""
    return torch.frombuffer(array("q", values), dtype=torch.int64)
