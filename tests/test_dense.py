"""A packed model as a plain one says the same, for every recipe on every family, and is transformers' own model."""

import pytest
import torch
from transformers import AutoModelForCausalLM

from conftest import FAMILIES, logits, relative
from rosaq import Calibration, load_recipe, quantize, shipped_recipes
from rosaq.embedding import RosaqEmbedding
from rosaq.engines.dense import dense_bytes, dense_model, dense_tensors, is_packed
from rosaq.engines.loading import load_model
from rosaq.kernels.reference import dequantize
from rosaq.linear import RosaqLinear
from rosaq.norm import RotatedNorm


@pytest.fixture
def checkpoint(saved, text_file, tmp_path):
    """Quantize a random model by a recipe; returns a function (recipe, family, **changes) -> folder."""

    def make(recipe, family, **changes):
        recipe = load_recipe(recipe)
        sizes = dict(group_size=16, bits=4) | (dict(salient=16, salient_per_head=4) if recipe.salient else {})
        sizes |= dict(salient_down=16) if recipe.salient_down else {}
        sizes |= dict(learning_steps=2) if recipe.learning_steps else {}
        sizes |= dict(distillation_windows=8, distillation_epochs=1) if recipe.distillation_windows else {}
        quantize(str(saved(family)), tmp_path / "out", recipe.replace(**{**sizes, **changes}), Calibration(str(text_file), 4, 32), "cpu")
        return tmp_path / "out"

    return make


@pytest.mark.parametrize("recipe", shipped_recipes())
def test_dense_equals_packed(recipe, family, checkpoint):
    packed = AutoModelForCausalLM.from_pretrained(checkpoint(recipe, family), dtype=torch.float32)
    plain = dense_model(packed)
    assert relative(logits(plain), logits(packed)) < 2e-6
    assert not any(type(module).__module__.startswith("rosaq.") for module in plain.modules())
    assert type(plain) is type(packed) and is_packed(packed) and not is_packed(plain)
    assert sum(parameter.numel() for parameter in plain.parameters()) * 4 == dense_bytes(packed, torch.float32)


@pytest.mark.parametrize("changes", [dict(embedding_bits="8"), dict(bits=3, salient_bits=8, group_size=32), dict(salient=0, salient_per_head=0)])
def test_dense_equals_packed_in_other_forms(changes, checkpoint):
    packed = AutoModelForCausalLM.from_pretrained(checkpoint("rosaq-paper", "llama-tied", **changes), dtype=torch.float32)
    assert relative(logits(dense_model(packed)), logits(packed)) < 2e-6
    assert any(isinstance(module, RosaqEmbedding) for module in packed.modules()) == ("embedding_bits" in changes)


def test_weights_are_the_stored_ones_bit_for_bit(checkpoint):
    packed = AutoModelForCausalLM.from_pretrained(checkpoint("mixed", "llama-biased"), dtype=torch.float32)
    assert any(module.layout.ordered for module in packed.modules() if isinstance(module, RosaqLinear))
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        found = dict(dense_tensors(packed, dtype))
        for name, module in packed.named_modules():
            if isinstance(module, RosaqLinear):
                exact = dequantize(module.layout, module.tensors(), torch.float64)
                assert torch.equal(found[f"{name}.weight"], exact.to(dtype))
                assert torch.equal(found[f"{name}.bias"], module.get_buffer("bias").to(dtype))


def test_a_rotation_after_a_norm_is_multiplied_in(checkpoint):
    packed = AutoModelForCausalLM.from_pretrained(checkpoint("rosaq-paper-per-layer", "qwen3"), dtype=torch.float32)
    norm = packed.model.layers[1].post_attention_layernorm
    assert isinstance(norm, RotatedNorm)
    stored = packed.model.layers[1].mlp.up_proj.dense_weight(torch.float64)
    found = dense_model(packed).model.layers[1].mlp.up_proj.weight
    torch.testing.assert_close(found.double(), stored @ norm.rotation.double().T, rtol=1e-6, atol=1e-7)


def test_a_plain_model_can_be_saved_as_any_other(checkpoint, tmp_path):
    packed = AutoModelForCausalLM.from_pretrained(checkpoint("rosaq-nearest", "qwen2"), dtype=torch.float32)
    dense_model(packed, torch.float16).save_pretrained(tmp_path / "plain")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "plain", dtype=torch.float32)
    assert not is_packed(again) and relative(logits(again), logits(packed)) < 2e-3


def test_a_layer_that_transforms_its_input_is_refused(checkpoint):
    class Doubling(RosaqLinear):
        def forward(self, x):
            return super().forward(2 * x)

    packed = AutoModelForCausalLM.from_pretrained(checkpoint("rtn", "llama"), dtype=torch.float32)
    packed.model.layers[0].mlp.up_proj.__class__ = Doubling
    with pytest.raises(ValueError, match=r"model.layers.0.mlp.up_proj: Doubling has no plain form"):
        dense_model(packed)


def test_loading(checkpoint):
    folder = str(checkpoint("rosaq-nearest", next(iter(FAMILIES))))
    packed, dense, auto = (load_model(folder, "cpu", "float32", weights=kind)[0] for kind in ("packed", "dense", "auto"))
    assert is_packed(packed) and not is_packed(dense) and not is_packed(auto)
    assert torch.equal(logits(dense), logits(auto)) and relative(logits(dense), logits(packed)) < 2e-6
    with pytest.raises(ValueError, match="weights 'sparse'; allowed are auto, dense, packed"):
        load_model(folder, "cpu", weights="sparse")
