"""QuaRot's recipes do what they are for, and the online Hadamard product is in the checkpoint, the loader and GPTQ's moment."""

import dataclasses
import json

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from conftest import logits, random_model, relative, tokenizer
from rosaq import Calibration, load_recipe, open_source, quantize
from rosaq.architecture import LINEARS, Architecture
from rosaq.basis import PreparedBlock
from rosaq.engines.loading import verify_checkpoint
from rosaq.hadamard import hadamard_matrix, hadamard_transform
from rosaq.hadamard_linear import HadamardLinear
from rosaq.kernels.reference import dequantize
from rosaq.plan import make_plan


def small(name, **changes):
    return load_recipe(name).replace(group_size=16, **changes)


def load(folder):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


@pytest.fixture
def calibration(text_file):
    return Calibration(str(text_file), samples=4, seq_len=32)


@pytest.fixture
def spiky(tmp_path):
    """A model whose weights have a few large columns: in the residual stream, in the heads' values, before W_down."""
    model = random_model("llama", intermediate_size=96)
    with torch.no_grad():
        for layer in model.model.layers:
            for role in ("q", "k", "v", "gate", "up"):
                layer.get_submodule(LINEARS[role]).weight[:, :6] *= 12
            layer.input_layernorm.weight[:6] /= 12
            layer.post_attention_layernorm.weight[:6] /= 12
            layer.self_attn.o_proj.weight[:, ::16] *= 12
            layer.self_attn.v_proj.weight[::16] /= 12
            layer.mlp.down_proj.weight[:, ::16] *= 12
            layer.mlp.up_proj.weight[::16] /= 12
    model.save_pretrained(tmp_path / "spiky")
    tokenizer().save_pretrained(tmp_path / "spiky")
    return tmp_path / "spiky"


def test_rotations_flatten_what_rounding_to_nearest_suffers_from(spiky, calibration, tmp_path):
    source, errors = open_source(str(spiky)), {}
    for name in ("rtn", "quarot", "quarot-r4"):
        quantize(source, tmp_path / name, small(name, bits=4).replace(group_size=48), calibration, "cpu")
        errors[name] = relative(logits(load(tmp_path / name)), logits(load(spiky)))
    assert errors["quarot-r4"] < 0.8 * errors["quarot"] and errors["quarot"] < 0.95 * errors["rtn"]


def test_the_seed_makes_the_checkpoint(saved, calibration, tmp_path):
    source = open_source(str(saved("qwen2")))
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        quantize(source, tmp_path / name, small("quarot").replace(seed=seed), calibration, "cpu")
    bytes_of = {name: (tmp_path / name / "model.safetensors").read_bytes() for name in "abc"}
    assert bytes_of["a"] == bytes_of["b"] != bytes_of["c"]


def test_the_online_product_is_said_loaded_and_saved_again(saved, calibration, tmp_path):
    quantize(str(saved("llama")), tmp_path / "r4", small("quarot-r4"), calibration, "cpu")
    quantize(open_source(str(tmp_path / "llama-original")), tmp_path / "plain", small("quarot"), calibration, "cpu")
    config = json.loads((tmp_path / "r4" / "config.json").read_text())["quantization_config"]
    assert config["hadamard_inputs"] == ["mlp.down_proj"]
    assert "hadamard_inputs" not in json.loads((tmp_path / "plain" / "config.json").read_text())["quantization_config"]
    assert load_file(tmp_path / "r4" / "model.safetensors").keys() == load_file(tmp_path / "plain" / "model.safetensors").keys()
    verify_checkpoint(tmp_path / "r4")
    for name in ("r4", "plain"):
        loaded = load(tmp_path / name)
        assert isinstance(loaded.model.layers[1].mlp.down_proj, HadamardLinear) == (name == "r4")
        assert not isinstance(loaded.model.layers[1].mlp.up_proj, HadamardLinear)
        loaded.save_pretrained(tmp_path / f"{name}-again")
        again = json.loads((tmp_path / f"{name}-again" / "config.json").read_text())["quantization_config"]
        assert again == json.loads((tmp_path / name / "config.json").read_text())["quantization_config"]
        assert torch.equal(logits(load(tmp_path / f"{name}-again")), logits(loaded))


def test_the_loaded_layer_is_the_dense_weight_turned_back(saved, calibration, tmp_path):
    quantize(str(saved("llama")), tmp_path / "r4", small("quarot-r4"), calibration, "cpu")
    layer = load(tmp_path / "r4").model.layers[0].mlp.down_proj
    x = torch.randn(5, 80, generator=torch.Generator().manual_seed(0))
    dense = hadamard_transform(dequantize(layer.layout, layer.tensors()), inverse=True)
    assert relative(layer(x), x @ dense.T) < 1e-5


def test_gptq_sees_the_inputs_behind_the_online_product():
    x = torch.randn(64, 24, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    turned = x @ hadamard_matrix(24).double() / 24**0.5
    prepared = PreparedBlock({}, down_rotated=True)
    assert torch.allclose(prepared.moment("mlp_out", x.T @ x), turned.T @ turned)
    assert torch.equal(prepared.moment("attn_out", x.T @ x), x.T @ x)


def test_a_width_without_a_hadamard_matrix_is_refused_before_anything_is_read():
    architecture = Architecture.of(random_model("llama").config)
    odd = dataclasses.replace(architecture, intermediate=90)
    with pytest.raises(ValueError, match="down_rotation is 'hadamard', but no Hadamard matrix of order 90 can be constructed"):
        make_plan(small("quarot-r4"), odd)
    assert make_plan(small("quarot"), odd).hadamard_inputs == ()
    assert make_plan(small("quarot-r4"), architecture).bits_per_weight == make_plan(small("quarot"), architecture).bits_per_weight


def test_r4_with_gptq_is_better_than_without(saved, calibration, tmp_path):
    original = saved("llama", intermediate_size=96)
    errors = {}
    for rounding in ("nearest", "gptq"):
        quantize(str(original), tmp_path / rounding, small("quarot-r4", bits=3, rounding=rounding), calibration, "cpu")
        errors[rounding] = relative(logits(load(tmp_path / rounding)), logits(load(original)))
    assert errors["gptq"] < 0.9 * errors["nearest"]
