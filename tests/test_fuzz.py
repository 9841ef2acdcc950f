"""Recipes, config.json and safetensors headers changed at random: a sentence that says what is wrong, or the right model."""

import json
import struct
import tomllib

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from conftest import random_model
from rosaq import Recipe, load_recipe, open_source
from rosaq.architecture import FAMILIES, Architecture
from rosaq.moments import collect
from rosaq.plan import make_plan
from rosaq.results import checkpoint_parts

FUZZ = settings(max_examples=50, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
ODD = st.one_of(
    st.none(), st.booleans(), st.integers(-3, 300), st.integers(), st.floats(), st.text(max_size=8), st.lists(st.integers(), max_size=2),
    st.dictionaries(st.text(max_size=3), st.integers(), max_size=2),
)  # fmt: skip
SMOLLM2 = Architecture(FAMILIES["llama"], 576, 1536, 30, 9, 3, 64, 49152, True, 8192)
FIELDS = sorted(Recipe("x").to_dict())


def sentence(error: ValueError) -> None:
    assert str(error) and "\n" not in str(error).strip()


@FUZZ
@given(st.dictionaries(st.sampled_from([*FIELDS, "colour"]), ODD, max_size=4), st.integers(0, 1000))
def test_recipes(changes, salient):
    try:
        recipe = Recipe.from_dict({"name": "x", "salient": salient, **changes})
        plan = make_plan(recipe, SMOLLM2)
    except ValueError as error:
        sentence(error)
        return
    assert recipe.to_dict() | {"name": "x", "salient": salient, **changes} == recipe.to_dict()
    assert plan.blocks[0]["q"].salient == recipe.salient and 2 < plan.bits_per_weight < 40


@FUZZ
@given(st.binary(max_size=60), st.sampled_from(["", 'name = "x"\n']))
def test_recipe_files(tmp_path, content, before):
    file = tmp_path / "r.toml"
    file.write_bytes(before.encode() + content)
    try:
        recipe = load_recipe(str(file))
    except ValueError as error:
        sentence(error)
        return
    assert recipe == Recipe(**tomllib.loads(file.read_text()))


class Original:
    """A model whose files a test may change."""

    def __init__(self, folder):
        random_model("llama").save_pretrained(folder)
        self.folder, self.config, self.shard = folder, (folder / "config.json").read_text(), (folder / "model.safetensors").read_bytes()
        self.right = everything(folder)

    def write(self, config=None, shard=None):
        (self.folder / "config.json").write_bytes(config or self.config.encode())
        (self.folder / "model.safetensors").write_bytes(self.shard if shard is None else shard)


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    return Original(tmp_path_factory.mktemp("fuzz") / "model")


def everything(folder):
    """All that quantizing reads of a model: (source, its tensors)."""
    source = open_source(str(folder))
    checkpoint_parts(source, make_plan(Recipe("x", salient=4, salient_per_head=2, group_size=16), source.architecture))
    list(collect(source, torch.arange(16).view(1, 16), "cpu", torch.float32, lambda *_: None))
    blocks = [source.block(index) for index in range(source.architecture.layers)]
    tables = {"embedding": source.embedding(), "head": source.head(), "norm": source.final_norm()}
    return source, [tables, *blocks]


def same(one, other):
    return all(a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a) for a, b in zip(one, other, strict=True))


SIZES = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim", "vocab_size")
OTHERS = ("model_type", "architectures", "attention_bias", "mlp_bias", "tie_word_embeddings", "max_position_embeddings", "quantization_config")


@FUZZ
@given(st.dictionaries(st.sampled_from(SIZES + OTHERS), ODD, min_size=1, max_size=2))
def test_configs(original, changes):
    original.write(json.dumps({**json.loads(original.config), **changes}).encode())
    try:
        source, tensors = everything(original.folder)
    except ValueError as error:
        sentence(error)
        return
    shape = {size: getattr(source.config, size) for size in SIZES}
    assert same(tensors, original.right[1]) or source.architecture.tied
    assert all(shape[size] == getattr(original.right[0].config, size) for size in SIZES if size != "head_dim")


@FUZZ
@given(st.binary(max_size=40), st.integers(0, 400))
def test_config_bytes(original, noise, place):
    config = original.config.encode()
    original.write(config[:place] + noise + config[place + len(noise) :])
    try:
        open_source(str(original.folder))
    except ValueError as error:
        sentence(error)


@FUZZ
@given(st.data())
def test_headers(original, data):
    """Bytes of the header, or its length, are changed; whatever is still read is what was written."""
    (size,) = struct.unpack("<Q", original.shard[:8])
    changed = bytearray(original.shard)
    for _ in range(data.draw(st.integers(1, 3))):
        changed[data.draw(st.integers(0, 8 + size - 1))] = data.draw(st.sampled_from([*b'0123456789[]{},:"FIB', 0, 255]))
    end = data.draw(st.one_of(st.just(len(changed)), st.integers(0, len(changed))))
    original.write(shard=bytes(changed[:end]))
    try:
        tensors = everything(original.folder)[1]
    except ValueError as error:
        sentence(error)
        return
    assert same(tensors, original.right[1])
