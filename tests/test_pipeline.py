"""The whole way: quantize, save, reload; the packed model says what the rounded weights say."""

import copy
import dataclasses
import json

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from conftest import logits, random_model, relative, tokenizer
from rosaq import Calibration, Recipe, load_recipe, measure, open_source, quantize, shipped_recipes
from rosaq.architecture import LINEARS
from rosaq.basis import Bases, prepare_block, residual_basis
from rosaq.checkpoint import verify
from rosaq.plan import make_plan
from rosaq.rounding.grid import round_to_nearest
from rosaq.skeleton import full_model

SMALL = dict(group_size=16, salient=16, salient_per_head=4)


def small(name, **changes):
    recipe = load_recipe(name)
    sizes = SMALL if recipe.salient else dict(group_size=16)
    sizes = {**sizes, "salient_down": 16} if recipe.salient_down else sizes
    steps = dict(learning_steps=2) if recipe.learning_steps else {}
    trained = dict(distillation_windows=8, distillation_epochs=1) if recipe.distillation_windows else {}
    return recipe.replace(**{**sizes, **steps, **trained, **changes})


@pytest.fixture
def calibration(text_file):
    return Calibration(str(text_file), samples=4, seq_len=32)


@pytest.mark.parametrize("recipe", shipped_recipes())
def test_every_recipe_on_every_family(recipe, family, saved, calibration, tmp_path):
    original = saved(family)
    report = quantize(str(original), tmp_path / "out", small(recipe, bits=4), calibration, "cpu")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    reference = AutoModelForCausalLM.from_pretrained(original, dtype=torch.float32)
    assert relative(logits(loaded), logits(reference)) < 0.25
    stored = sum(t.numel() * t.itemsize for t in load_file(tmp_path / "out" / "model.safetensors").values())
    assert stored == report.checkpoint_bytes
    config = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert Recipe.from_dict(config["recipe"]) == small(recipe, bits=4)
    assert len(config["calibration"]["windows_sha256"]) == 64
    verify(tmp_path / "out")
    assert AutoTokenizer.from_pretrained(tmp_path / "out")("abc").input_ids == AutoTokenizer.from_pretrained(original)("abc").input_ids
    card = (tmp_path / "out" / "README.md").read_text()
    assert f"{report.bits_per_weight:.2f} bits per weight" in card and recipe in card


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_packed_model_equals_the_rounded_one(bits, family, saved, calibration, tmp_path):
    """Within 2e-3 relative: what separates them is FP16 storage of norms, tables, biases and salient weights."""
    source = open_source(str(saved(family)))
    recipe = small("rosaq-paper", bits=bits, embedding_bits="16")
    statistics = measure(source, calibration, "cpu")
    quantize(source, tmp_path / "out", recipe, statistics, "cpu")
    packed = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)

    plan = make_plan(recipe, source.architecture)
    basis = residual_basis(statistics.residual_moment(), recipe)
    rounded = full_model(source, torch.float32)
    head = (rounded.lm_head.weight * rounded.model.norm.weight) @ basis.float()
    rounded.model.embed_tokens.weight = torch.nn.Parameter(rounded.model.embed_tokens.weight @ basis.float())
    rounded.lm_head.weight = torch.nn.Parameter(head)
    rounded.model.norm.weight = torch.nn.Parameter(torch.ones(source.architecture.hidden))
    for index, layer in enumerate(rounded.model.layers):
        prepared = prepare_block(source.block(index), statistics.inputs[index], recipe, source.architecture, Bases(basis), plan.blocks[0])
        for role, module in LINEARS.items():
            layout, weight = plan.blocks[0][role], prepared.block[f"{module}.weight"].clone()
            columns = layout.quantized_columns()
            weight[:, columns] = round_to_nearest(weight[:, columns], layout)
            prepared.block[f"{module}.weight"] = weight
        layer.load_state_dict(prepared.block)
    assert relative(logits(packed), logits(rounded)) < 2e-3
    assert relative(logits(packed), logits(full_model(source, torch.float32))) > 1e-2  # and rounding did something


def test_without_rounding_error_the_method_is_exact(saved, calibration, tmp_path):
    """Nearly all channels salient: what is left is FP16 storage."""
    original = saved("llama")
    recipe = small("rosaq-paper", salient=47, salient_per_head=15, down_scaling="none")
    quantize(str(original), tmp_path / "out", recipe, calibration, "cpu")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    reference = AutoModelForCausalLM.from_pretrained(original, dtype=torch.float32)
    down_only = copy.deepcopy(reference)
    plan = make_plan(recipe, open_source(str(original)).architecture)
    for layer in down_only.model.layers:
        layer.mlp.down_proj.weight.data = round_to_nearest(layer.mlp.down_proj.weight.data, plan.blocks[0]["down"])
    ours, theirs = relative(logits(loaded), logits(reference)), relative(logits(down_only), logits(reference))
    assert ours < 1.5 * theirs


def test_tied_tables_untie_only_as_far_as_needed(saved, calibration, tmp_path):
    original = saved("llama-tied", vocab_size=97)
    for name, tables, tied in (("rtn", "weight", True), ("rosaq-paper", "weight", False)):
        quantize(str(original), tmp_path / name, small(name, embedding_bits="16"), calibration, "cpu")
        tensors = load_file(tmp_path / name / "model.safetensors")
        assert f"model.embed_tokens.{tables}" in tensors and (f"lm_head.{tables}" in tensors) != tied
        assert json.loads((tmp_path / name / "config.json").read_text())["tie_word_embeddings"] is tied


def test_large_tied_tables_go_to_8_bits_where_half_the_size_asks_for_it():
    from rosaq.architecture import FAMILIES, Architecture

    smollm2 = Architecture(FAMILIES["llama"], 576, 1536, 30, 9, 3, 64, 49152, True, 8192)
    recipe = load_recipe("rosaq-paper").replace(group_size=64, salient=64, salient_per_head=16)
    assert not make_plan(recipe.replace(embedding_bits="16"), smollm2).tables
    plan = make_plan(recipe, smollm2)
    assert plan.tables and plan.untied and 2 * plan.checkpoint_bytes < plan.original_bytes
    assert not make_plan(load_recipe("rtn"), smollm2).tables
    assert not make_plan(recipe, dataclasses.replace(smollm2, tied=False)).tables


@pytest.mark.parametrize("width", [40, 56, 100])
def test_widths_that_no_group_divides(width, saved, calibration, tmp_path):
    original = saved("llama", hidden_size=width, num_attention_heads=4, head_dim=10, num_key_value_heads=2, intermediate_size=90)
    quantize(str(original), tmp_path / "out", small("rosaq-paper", group_size=32, salient=16, salient_per_head=3), calibration, "cpu")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    reference = AutoModelForCausalLM.from_pretrained(original, dtype=torch.float32)
    assert relative(logits(loaded), logits(reference)) < 0.25


@pytest.mark.parametrize("recipe", ["rosaq-paper", "rosaq-random", "awq", "gptq-act-order"])
def test_the_same_command_gives_the_same_bytes(recipe, saved, calibration, tmp_path):
    original = saved("llama")
    for name in ("a", "b"):
        quantize(str(original), tmp_path / name, small(recipe), calibration, "cpu")
    assert (tmp_path / "a" / "model.safetensors").read_bytes() == (tmp_path / "b" / "model.safetensors").read_bytes()


def test_shards_and_index(saved, calibration, tmp_path, monkeypatch):
    monkeypatch.setattr("rosaq.shard_files.SHARD_BYTES", 20_000)
    original = saved("llama")
    quantize(str(original), tmp_path / "many", small("rosaq-paper"), calibration, "cpu")
    monkeypatch.undo()
    quantize(str(original), tmp_path / "one", small("rosaq-paper"), calibration, "cpu")
    shards = sorted(path.name for path in (tmp_path / "many").glob("*.safetensors"))
    assert len(shards) > 2 and shards[0] == f"model-00001-of-{len(shards):05d}.safetensors"
    verify(tmp_path / "many")
    many, one = (AutoModelForCausalLM.from_pretrained(tmp_path / name, dtype=torch.float32) for name in ("many", "one"))
    assert torch.equal(logits(many), logits(one))


def test_self_calibration_is_seeded(saved, tmp_path):
    original = saved("llama")
    calibration = Calibration("self", samples=3, seq_len=16, seed=5)
    hashes = []
    for name in ("a", "b"):
        report = quantize(str(original), tmp_path / name, small("rosaq-paper"), calibration, "cpu")
        hashes.append(report.calibration["windows_sha256"])
    other = quantize(str(original), tmp_path / "c", small("rosaq-paper"), dataclasses.replace(calibration, seed=6), "cpu")
    assert hashes[0] == hashes[1] != other.calibration["windows_sha256"]


def test_salient_channels_matter(saved, calibration, tmp_path):
    """Strong directions kept in FP16 must save a good part of the error."""
    model = random_model("llama", hidden_size=64, intermediate_size=96)
    with torch.no_grad():  # a residual stream with a few strong directions
        mix = torch.diag(torch.logspace(0, -2, 64)) @ torch.linalg.qr(torch.randn(64, 64))[0]
        model.model.embed_tokens.weight.copy_(model.model.embed_tokens.weight @ mix)
    model.save_pretrained(tmp_path / "model")
    tokenizer().save_pretrained(tmp_path / "model")
    source = open_source(str(tmp_path / "model"))
    statistics = measure(source, calibration, "cpu")
    errors = {}
    for salient in (0, 16):
        recipe = load_recipe("rosaq-paper").replace(bits=3, group_size=16, salient=salient, salient_per_head=0, down_scaling="none")
        quantize(source, tmp_path / str(salient), recipe, statistics, "cpu")
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path / str(salient), dtype=torch.float32)
        errors[salient] = relative(logits(loaded), logits(model))
    assert errors[16] < 0.8 * errors[0]


def test_mixed_keeps_the_channels_that_carry_most(calibration, tmp_path):
    """Rounding to nearest loses most at input channels that stand out; Mixed finds them and keeps them precise."""
    loud, model = torch.tensor([3, 17, 22, 40, 41, 59]), random_model("llama", hidden_size=64, intermediate_size=96)
    with torch.no_grad():
        for layer in model.model.layers:
            layer.input_layernorm.weight[loud] *= 12
            layer.post_attention_layernorm.weight[loud] *= 12
    model.save_pretrained(tmp_path / "model")
    tokenizer().save_pretrained(tmp_path / "model")
    source, errors = open_source(str(tmp_path / "model")), {}
    for name in ("rtn", "mixed"):
        quantize(source, tmp_path / name, small(name, bits=3), calibration, "cpu")
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path / name, dtype=torch.float32)
        errors[name] = relative(logits(loaded), logits(model))
    stored = load_file(tmp_path / "mixed" / "model.safetensors")
    for layer in range(2):
        for site in ("self_attn.q_proj", "mlp.gate_proj"):
            assert set(loud.tolist()) <= set(stored[f"model.layers.{layer}.{site}.order"][:16].tolist())
    assert errors["mixed"] < 0.7 * errors["rtn"]
