"""`rosaq benchmark decode`: what it makes of times, its random models, and one run of it on a tiny model."""

import json
import subprocess
import sys

import pytest
import torch

from rosaq import load_recipe
from rosaq.architecture import Architecture
from rosaq.benchmark.decoding import Settings, Timing, benchmark_decoding, peer_group_size, rows
from rosaq.benchmark.decoding_run import kv_cache_bytes, median_step_ms, prompts, vllm_options
from rosaq.benchmark.model_shapes import SHAPES, shape_config
from rosaq.embedding import RosaqEmbedding
from rosaq.engines.dummy import dummy_config, dummy_model, write_dummy
from rosaq.engines.loading import verify_checkpoint
from rosaq.linear import RosaqLinear


def test_speed_and_throughput_are_those_of_the_paper():
    """DecodeSpeed = 1 / median time per token, Throughput = DecodeSpeed x batch; ratios within one engine."""
    timings = [
        Timing("vllm", "fp16", {"64/256": 8.0}), Timing("vllm", "rosaq", {"64/256": 5.0}), Timing("vllm", "machete", {"64/256": 6.0}),
        Timing("vllm", "marlin", {"64/256": 7.0}), Timing("transformers", "rosaq", {"64/256": 20.0}), Timing("vllm", "w4a16", failure="no"),
    ]  # fmt: skip
    found = {(row["engine"], row["weights"]): row for row in rows(timings)}
    ours = found["vllm", "rosaq"]
    assert (ours["decode_speed"], ours["throughput"], ours["to_fp16"], ours["to_best_peer"]) == (200.0, 12800.0, 1.6, 1.2)
    assert found["transformers", "rosaq"]["to_fp16"] is None and found["transformers", "rosaq"]["to_best_peer"] is None
    assert len(found) == 5


def test_the_median_leaves_out_the_prompt_and_one_slow_step():
    run = [0.0, 5.0, 5.5, 6.0, 6.002, 6.004, 7.0, 7.002]
    assert median_step_ms([run, [stamp + 100 for stamp in run]]) == pytest.approx(2.0)


def test_prompts_are_token_ids_of_the_model():
    ids = torch.tensor(prompts(3, 16, 97))
    assert ids.shape == (3, 16) and ids.min() >= 5 and ids.max() < 97 and prompts(3, 16, 97) == ids.tolist()


def test_an_engine_takes_the_memory_that_the_pairs_need_and_further_options():
    config = shape_config("llama-2-7b")
    settings = Settings(((1, 100), (64, 256)), vllm_options={"attention_backend": "TRITON_ATTN", "compilation_config": {"mode": 0}})
    options = vllm_options(config, settings)
    assert options["attention_backend"] == "TRITON_ATTN" and options["compilation_config"] == {"cudagraph_capture_sizes": [1, 64], "mode": 0}
    assert options["max_model_len"] == 512 and options["max_num_batched_tokens"] == 64 * 256
    assert kv_cache_bytes(config, settings) == 32 * 2 * 4096 * 2 * (64 * 512 + 128)  # layers, keys and values, channels, bytes, tokens
    halved = Settings(settings.pairs, "bfloat16", "fp8", tensor_parallel=2)
    assert kv_cache_bytes(config, halved) * 4 == kv_cache_bytes(config, settings)


@pytest.mark.parametrize("name", list(SHAPES))
def test_every_shape_has_a_checkpoint_and_groups_for_peers(name):
    config = shape_config(name)
    recipe = load_recipe("rosaq-int4")
    dummy = dummy_config(config, recipe, torch.float16)
    assert dummy.quantization_config["layouts"]["self_attn.q_proj"]["salient"] == 128
    assert peer_group_size(Architecture.of(config), 128) == (64 if name == "smollm2-135m" else 128)


def test_a_shape_that_peers_cannot_run_is_said():
    config = shape_config("smollm2-135m")
    config.hidden_size = 592
    with pytest.raises(ValueError, match="no group of 128, 64 or 32 channels divides"):
        peer_group_size(Architecture.of(config), 128)


def test_random_models_of_every_family_are_finite(family, saved):
    config = shape_config(str(saved(family)))
    recipe = load_recipe("rosaq-nearest").replace(group_size=16, salient=16, salient_per_head=4, embedding_bits="8")
    model = dummy_model(dummy_config(config, recipe, torch.float16), torch.bfloat16, "cpu")
    assert sum(isinstance(module, RosaqLinear) for module in model.modules()) == 15
    assert isinstance(model.model.embed_tokens, RosaqEmbedding)
    with torch.inference_mode():
        assert model(torch.arange(10)[None]).logits.isfinite().all()


def test_a_random_checkpoint_is_a_checkpoint(saved, tmp_path):
    recipe = load_recipe("rosaq-paper").replace(group_size=16, salient=16, salient_per_head=4)
    write_dummy(dummy_config(shape_config(str(saved("llama-biased"))), recipe, torch.float16), tmp_path / "out")
    assert verify_checkpoint(tmp_path / "out")["files"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(engines=["tensorrt"]), "engine 'tensorrt'; allowed are vllm, transformers, transformers-compiled"),
        (dict(weights=["int2"]), "weights 'int2'; allowed are fp16, rosaq, machete, marlin, w4a16"),
        (dict(model="gpt-5"), "gpt-5: neither a model folder nor a known shape; shapes are llama-2-7b"),
        (dict(model="llama-2-7b", settings=Settings(pairs=((1, 4096),))), "a context of 4096 tokens is too short for 8192"),
    ],
)
def test_what_cannot_be_timed_is_refused(change, message):
    with pytest.raises(ValueError, match=message):
        benchmark_decoding(**{**dict(model="smollm2-135m", recipe=load_recipe("rosaq-int4"), settings=Settings()), **change})


@pytest.mark.parametrize(
    "change", [dict(dtype="float32"), dict(kv_cache_dtype="int4"), dict(pairs=()), dict(pairs=((0, 128),)), dict(at_once=0), dict(repeats=0)]
)
def test_settings_that_mean_nothing_are_refused(change):
    with pytest.raises(ValueError):
        Settings(**change)


def test_one_run(saved, tmp_path):
    folder = saved("llama")
    command = [sys.executable, "-m", "rosaq", "benchmark", "decode", str(folder), "--engine", "transformers", "--pairs", "1/8,2/12", "--repeats", "1"]
    done = subprocess.run([*command, "--group-size", "16", "--json", "-o", str(tmp_path / "rows.json")], capture_output=True, text=True)
    # The tiny model is narrower than the recipe's salient channels: said, and no result is made up.
    assert done.returncode == 1 and "salient is 128, but the model is 48 channels wide" in done.stderr
    recipe = tmp_path / "small.toml"
    recipe.write_text('name = "small"\ngroup_size = 16\nsalient = 16\nsalient_per_head = 4\n')
    command += ["--recipe", str(recipe), "--json", "-o", str(tmp_path / "rows.json"), "--at-once", "2"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert result == json.loads((tmp_path / "rows.json").read_text()) and result["failures"] == []
    assert [(row["weights"], row["batch"], row["tokens"]) for row in result["rows"]] == [
        ("fp16", 1, 8), ("fp16", 2, 12), ("rosaq", 1, 8), ("rosaq", 2, 12),
    ]  # fmt: skip
    assert all(row["step_ms"] > 0 and row["details"]["start_s"] > 0 for row in result["rows"])
    assert {row["details"]["kernel"] for row in result["rows"] if row["weights"] == "rosaq"} == {"cpu"}


def test_vllm_options_that_are_not_json_are_refused():
    for text in ("{", "[1]"):
        command = [sys.executable, "-m", "rosaq", "benchmark", "decode", "--engine", "transformers", "--vllm-options", text]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 1 and f"vllm-options '{text}'" in done.stderr


def test_a_case_that_fails_is_told_and_not_filled_in(saved, tmp_path):
    """The checkpoint's file is cut short, so its process ends with an error."""
    recipe = load_recipe("rosaq-paper").replace(group_size=16, salient=16, salient_per_head=4)
    write_dummy(dummy_config(shape_config(str(saved("llama"))), recipe, torch.float16), tmp_path / "out")
    with (tmp_path / "out" / "model.safetensors").open("r+b") as file:
        file.truncate(1000)
    result = benchmark_decoding(str(tmp_path / "out"), recipe, Settings(((1, 8),), "bfloat16"), ["transformers"], ["rosaq"])
    assert result["rows"] == [] and "model.safetensors" in result["failures"][0]["failure"]
