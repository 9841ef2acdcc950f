"""A checkpoint written in ordinary formats means the same model, and what a format cannot hold is refused."""

import json

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from rosaq import Calibration, load_recipe, quantize
from rosaq.engines.export import common_group, export
from rosaq.engines.transformers import RosaqConfig
from rosaq.kernels import reference
from rosaq.shard_files import sha256
from rosaq.skeleton import meta_model

IDS = torch.arange(3, 43).view(2, 20)
RECIPES = {
    "int8 salient": ("rosaq-nearest", dict(group_size=16, salient=16, salient_per_head=4, embedding_bits="8")),
    "gather": ("mixed", dict(group_size=16, salient=16, salient_per_head=4)),
    "per layer": ("rosaq-paper-per-layer", dict(group_size=16, salient=16, salient_per_head=4)),
    "int3": ("rosaq-nearest", dict(bits=3, group_size=32, salient=16, salient_per_head=3)),
}


@pytest.fixture
def made(saved, text_file, tmp_path):
    def make(family, recipe, **sizes):
        name, changes = recipe
        quantize(str(saved(family, **sizes)), tmp_path / "packed", load_recipe(name).replace(**changes), Calibration(str(text_file), 2, 32), "cpu")
        return tmp_path / "packed"

    return make


def logits(folder):
    with torch.inference_mode():
        return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)(IDS).logits


def difference(got, expected):
    return float((got - expected).norm() / expected.norm())


def test_dense_is_the_same_model(made, family, tmp_path):
    packed = made(family, RECIPES["int8 salient"])
    export(packed, tmp_path / "dense", dtype="float32")
    assert difference(logits(tmp_path / "dense"), logits(packed)) < 1e-5
    assert "quantization_config" not in json.loads((tmp_path / "dense" / "config.json").read_text())
    assert AutoTokenizer.from_pretrained(tmp_path / "dense")("abc").input_ids == AutoTokenizer.from_pretrained(packed)("abc").input_ids


def test_several_shards_hold_the_same_model(made, tmp_path, monkeypatch):
    """Shards are cut where the next tensor would be too much, named as transformers looks for them, and indexed."""
    packed = made("llama", RECIPES["int8 salient"])
    export(packed, tmp_path / "one")
    monkeypatch.setattr("rosaq.checkpoint_writer.SHARD_BYTES", 20_000)
    export(packed, tmp_path / "several")
    shards = sorted((tmp_path / "several").glob("*.safetensors"))
    assert len(shards) > 3 and [file.name for file in shards] == [f"model-{n + 1:05d}-of-{len(shards):05d}.safetensors" for n in range(len(shards))]
    parts, whole = [load_file(file) for file in shards], load_file(tmp_path / "one" / "model.safetensors")
    for part in parts:
        assert len(part) == 1 or sum(tensor.numel() * tensor.itemsize for tensor in part.values()) <= 20_000
    index = json.loads((tmp_path / "several" / "model.safetensors.index.json").read_text())
    assert index["weight_map"] == {name: file.name for file, part in zip(shards, parts, strict=True) for name in part}
    assert index["metadata"]["total_size"] == sum(tensor.numel() * tensor.itemsize for tensor in whole.values())
    joined = {name: tensor for part in parts for name, tensor in part.items()}
    assert joined.keys() == whole.keys() and all(torch.equal(joined[name], whole[name]) for name in whole)
    assert torch.equal(logits(tmp_path / "several"), logits(tmp_path / "one"))
    written = json.loads((tmp_path / "several" / "rosaq.json").read_text())["files"]
    assert written.keys() == {file.name for file in shards}
    assert all((entry["bytes"], entry["sha256"]) == (file.stat().st_size, sha256(file)) for file, entry in zip(shards, written.values(), strict=True))


@pytest.mark.parametrize("recipe", list(RECIPES))
def test_dense_in_half_precision(made, recipe, tmp_path):
    packed = made("qwen2", RECIPES[recipe])
    export(packed, tmp_path / "dense")
    tensors = load_file(tmp_path / "dense" / "model.safetensors")
    assert {tensor.dtype for tensor in tensors.values()} == {torch.float16}
    assert json.loads((tmp_path / "dense" / "config.json").read_text())["dtype"] == "float16"
    assert difference(logits(tmp_path / "dense"), logits(packed)) < 3e-3


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_compressed_tensors_hold_the_same_numbers(made, bits, tmp_path):
    """Read back by the format's own definition: eight values of 4 bits a word, the lowest first; zero points along the outputs."""
    packed = made("llama-biased", ("rtn", dict(bits=bits, group_size=64)), hidden_size=64, intermediate_size=96)
    export(packed, tmp_path / "w4a16", "compressed-tensors")
    config = json.loads((tmp_path / "w4a16" / "config.json").read_text())["quantization_config"]
    weights = config["config_groups"]["group_0"]["weights"]
    assert (weights["group_size"], weights["symmetric"], config["format"]) == (32, False, "pack-quantized")  # 96 is no multiple of 64
    got, stored = load_file(tmp_path / "w4a16" / "model.safetensors"), load_file(packed / "model.safetensors")
    shifts = torch.arange(0, 32, 4)
    for module, layout in layouts(packed).items():
        n, k = got.pop(f"{module}.weight_shape").tolist()
        codes = (got.pop(f"{module}.weight_packed")[:, :, None] >> shifts & 15).reshape(n, k)
        zeros = (got.pop(f"{module}.weight_zero_point")[:, None] >> shifts[:, None] & 15).reshape(n, k // 32)
        weight = (codes - zeros.repeat_interleave(32, 1)) * got.pop(f"{module}.weight_scale").float().repeat_interleave(32, 1)
        mine = {name: stored[f"{module}.{name}"] for name in layout.tensors()}
        assert torch.equal(weight, reference.dequantize(layout, mine))
        assert torch.equal(got.pop(f"{module}.bias"), mine["bias"])
    assert set(got) == {name for name in stored if name in got}  # the rest goes by its own name


def layouts(folder):
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(folder)
    quantized = RosaqConfig.from_dict(config.quantization_config)
    linears = {name: module for name, module in meta_model(config).named_modules() if isinstance(module, torch.nn.Linear)}
    found = {name: quantized.layout(name, tuple(module.weight.shape), module.bias is not None) for name, module in linears.items()}
    return {name: layout for name, layout in found.items() if layout is not None}


@pytest.mark.parametrize(
    ("recipe", "form", "message"),
    [
        (RECIPES["int8 salient"], "compressed-tensors", r"q_proj keeps 16 salient channels at 8 bits, .* one width .*; export --format dense"),
        (("rtn", dict(group_size=16)), "compressed-tensors", r"groups of 16 channels are all that .* in common, .*\(32, 64, 128\)"),
        (("rosaq-paper-per-layer", dict(group_size=16, salient=0, salient_per_head=0)), "compressed-tensors", r"input_layernorm rotates at run time"),
        (("rtn", {}), "onnx", r"format 'onnx'; allowed are dense, compressed-tensors"),
    ],
)
def test_what_a_format_cannot_hold_is_refused(made, tmp_path, recipe, form, message):
    packed = made("llama", recipe)
    with pytest.raises(ValueError, match=message):
        export(packed, tmp_path / "out", form)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["llama-original", "packed", "text.jsonl"]


def test_a_layer_that_gathers_is_named(made):
    from dataclasses import replace

    loaded = AutoModelForCausalLM.from_pretrained(made("llama", RECIPES["gather"]))
    layer = loaded.model.layers[0].self_attn.q_proj
    layer.layout = replace(layer.layout, salient=0)
    with pytest.raises(ValueError, match=r"layers.0.self_attn.q_proj gathers its input"):
        common_group(loaded)


def test_only_a_whole_rosaq_checkpoint_is_exported(made, saved, tmp_path):
    with pytest.raises(ValueError, match=r"not the folder of a rosaq checkpoint"):
        export(saved("llama"), tmp_path / "out")
    packed = made("llama", ("rtn", dict(group_size=16)))
    with (packed / "model.safetensors").open("r+b") as file:
        file.truncate(1000)
    with pytest.raises(ValueError, match=r"1000 bytes"):
        export(packed, tmp_path / "out")
    assert not (tmp_path / "out").exists()
