"""The benchmark of quantization makes the model that it says, leaves nothing but it, and extrapolates as it says."""

import pytest

from rosaq import load_recipe, open_source
from rosaq.benchmark.model_shapes import named_config
from rosaq.benchmark.quantizing import Case, benchmark_quantize
from rosaq.run import Means

RECIPE = load_recipe("rosaq-paper").replace(group_size=16, salient=16, salient_per_head=4)


def test_some_blocks_stand_for_all(tmp_path):
    figures = benchmark_quantize(Case("tiny", 2, 3, 64), tmp_path, RECIPE, "cpu", Means())
    source = open_source(str(tmp_path / "tiny-2"))
    assert source.architecture.layers == 2 and source.half and set(source.tensors) >= {"lm_head.weight", "model.norm.weight"}
    assert [path.name for path in tmp_path.iterdir()] == ["tiny-2"]
    seconds, all_blocks = figures["report"]["seconds"], figures["seconds_of_all_blocks"]
    assert all_blocks["activations"] == 2 * seconds["activations"] and all_blocks["rotation"] == seconds["rotation"]
    again = benchmark_quantize(Case("tiny", 2, 3, 64, warm=True), tmp_path, RECIPE, "cpu", Means())
    assert again["report"]["checkpoint_bytes"] == figures["report"]["checkpoint_bytes"]


def test_what_there_is_no_shape_of(tmp_path):
    with pytest.raises(ValueError, match="shape 'huge'; allowed are tiny, llama-2-7b"):
        benchmark_quantize(Case("huge"), tmp_path, RECIPE, "cpu", Means())
    with pytest.raises(ValueError, match="blocks is 81; llama-2-70b has 1 to 80"):
        benchmark_quantize(Case("llama-2-70b", 81), tmp_path, RECIPE, "cpu", Means())
    assert named_config("llama-3-8b", 32).num_key_value_heads == 8
