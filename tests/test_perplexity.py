"""The evaluation protocol, against a model whose predictions are known."""

import math

import pytest
import torch

from conftest import random_model, tokenizer
from rosaq.clock import no_progress
from rosaq.evaluation.perplexity import divergence, join_wikitext, perplexity, text_windows


def test_wikitext_lines_are_joined_as_gptq_joins_them():
    assert join_wikitext([" \n", " = Title = \n", " \n", " Text . \n"]) == "\n\n = Title = \n\n\n\n\n Text . \n"


def test_only_whole_windows_count():
    windows = text_windows("abcdefghijk", tokenizer(), 4)
    assert windows.shape == (2, 4) and windows.flatten().tolist() == tokenizer()("abcdefgh").input_ids
    with pytest.raises(ValueError, match="2 tokens, less than one window of 4"):
        text_windows("ab", tokenizer(), 4)


def test_a_model_that_knows_nothing():
    model = random_model("llama")
    torch.nn.init.zeros_(model.lm_head.weight)
    result = perplexity(model, torch.arange(60).view(3, 20), no_progress)
    assert result.perplexity == pytest.approx(97, rel=1e-4) and result.windows == 3 and result.standard_error == pytest.approx(0, abs=1e-3)


def test_perplexity_is_the_mean_over_predicted_tokens():
    model, windows = random_model("llama"), torch.arange(60).view(3, 20)
    with torch.inference_mode():
        chances = model(windows).logits.log_softmax(-1)
    picked = torch.gather(chances[:, :-1], 2, windows[:, 1:, None])
    assert perplexity(model, windows, no_progress).perplexity == pytest.approx(math.exp(-float(picked.mean())), rel=1e-5)


def test_divergence():
    model, other, windows = random_model("llama"), random_model("llama", seed=1), torch.arange(60).view(3, 20)
    same = divergence(model, model, windows, no_progress)
    assert same.kl_divergence == pytest.approx(0, abs=1e-6) and same.top1_agreement == 1
    apart = divergence(other, model, windows, no_progress)
    with torch.inference_mode():
        p, q = (m(windows).logits[:, :-1].double().log_softmax(-1) for m in (model, other))
    assert apart.kl_divergence == pytest.approx(float((p.exp() * (p - q)).sum(-1).mean()), rel=1e-4)
    assert apart.top1_agreement == pytest.approx(float((p.argmax(-1) == q.argmax(-1)).double().mean()))
    assert apart.reference.perplexity == pytest.approx(same.model.perplexity)
