"""The real SmolLM2-135M: read from GGUF, quantized, reloaded, compared. Slow tests of the suite: a minute or two."""

import pytest
import torch
from transformers import AutoModelForCausalLM

import rosaq
from rosaq.clock import no_progress
from rosaq.engines.loading import load_model, verify_checkpoint
from rosaq.evaluation.perplexity import divergence, text_windows
from rosaq.skeleton import full_model

SIZES = dict(group_size=64, salient=64, salient_per_head=16)


@pytest.fixture(scope="module")
def source(smollm2):
    return rosaq.open_source(str(smollm2))


@pytest.fixture(scope="module")
def windows(source):
    text = "The river runs through the old town, past the mill and the market square. " * 40
    return text_windows(text, source.tokenizer, 256)[:2]


def test_gguf_is_read_as_transformers_reads_it(smollm2, source):
    theirs = AutoModelForCausalLM.from_pretrained(smollm2.parent, gguf_file=smollm2.name, dtype=torch.float32).state_dict()
    ours = dict(source.tensors)
    assert set(theirs) - set(ours) == {"lm_head.weight"} and source.architecture.tied
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_the_checkpoint_is_under_half_and_predicts_as_the_original(source, windows, tmp_path):
    statistics = rosaq.measure(source, rosaq.Calibration("self", 4, 128), "cpu")
    original = full_model(source, torch.float32)
    results = {}
    for name in ("rtn", "rosaq-paper"):
        recipe = rosaq.load_recipe(name)
        recipe = recipe.replace(**(SIZES if recipe.salient else dict(group_size=64)))
        report = rosaq.quantize(source, tmp_path / name, recipe, statistics, "cpu")
        verify_checkpoint(tmp_path / name)
        assert 2 * (tmp_path / name / "model.safetensors").stat().st_size < report.original_bytes
        model, _ = load_model(str(tmp_path / name), "cpu", "float32")
        results[name] = divergence(model, original, windows, no_progress)
    assert results["rosaq-paper"].kl_divergence < 0.1 and results["rosaq-paper"].top1_agreement > 0.85


def test_bfloat16_decoding_follows_the_float32_checkpoint(source, windows, tmp_path):
    """The CPU's int4 product: logits within 5 % of the exact path's, the same likeliest token nearly always."""
    recipe = rosaq.load_recipe("rosaq-int4").replace(**SIZES)
    rosaq.quantize(source, tmp_path / "out", recipe, rosaq.measure(source, windows, "cpu"), "cpu")
    exact, _ = load_model(str(tmp_path / "out"), "cpu", "float32")
    fast, _ = load_model(str(tmp_path / "out"), "cpu", "bfloat16")
    ids = windows[:1, :32]  # few enough tokens for the int4 product
    with torch.inference_mode():
        wanted, got = exact(ids).logits, fast(ids).logits.float()
    assert float((got - wanted).norm() / wanted.norm()) < 0.05
    assert float((got.argmax(-1) == wanted.argmax(-1)).float().mean()) > 0.85
