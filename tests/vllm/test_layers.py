"""vLLM's own layers, filled from a small checkpoint, against transformers' modules of the same checkpoint; ranks are played one by one."""

import json

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from rosaq import Calibration, load_recipe, quantize

pytestmark = pytest.mark.vllm
BLOCK = "model.layers.1."
CASES = {  # family and recipe: biases and INT8 salient channels, of W_down too; three bits; two; bits where they count; a gather of the inputs
    "biased": ("llama-biased", "rosaq-int4", dict(salient=16, salient_per_head=4, salient_down=16)),
    "int3": ("qwen3", "rosaq-nearest", dict(bits=3, salient=16, salient_per_head=3)),
    "int2": ("mistral", "rosaq-int4", dict(bits=2, salient=16, salient_per_head=4, salient_down=16)),
    "allocated": (  # each site of each block in a form of its own
        "llama",
        "rosaq-int4",
        dict(salient=16, salient_per_head=4, salient_down=32, allocation="4:16:16,4:4:16,2:8:32,4:32:16 3:8:16,4:0:16,4:0:32,2:32:16"),
    ),
    "ordered": ("mistral", "mixed", dict(salient=16, salient_per_head=4)),
}


@pytest.fixture(scope="module")
def engine(tmp_path_factory):
    """vLLM's process groups, of this one process."""
    from vllm.config import VllmConfig, set_current_vllm_config
    from vllm.distributed import destroy_distributed_environment, destroy_model_parallel, init_distributed_environment, initialize_model_parallel

    from rosaq.engines.vllm import register

    register()
    register()
    with set_current_vllm_config(VllmConfig()):
        init_distributed_environment(1, 0, f"file://{tmp_path_factory.mktemp('group') / 'store'}", 0, backend="gloo")
        initialize_model_parallel(1, 1)
        yield
        destroy_model_parallel()
        destroy_distributed_environment()


@pytest.fixture
def checkpoint(saved, text_file, tmp_path):
    def make(case):
        family, recipe, changes = CASES[case]
        chosen = load_recipe(recipe).replace(group_size=16, embedding_bits="8", **changes)
        quantize(
            str(saved(family, intermediate_size=96)),
            tmp_path / case,
            chosen,
            Calibration(str(text_file), 2, 32),
            "cpu",
        )
        return tmp_path / case

    return make


def vllm_config(folder):
    from vllm.model_executor.layers.quantization import get_quantization_config

    values = json.loads((folder / "config.json").read_text())["quantization_config"]
    config = get_quantization_config("rosaq").from_config(values)
    config.packed_modules_mapping = {"qkv_proj": ["q_proj", "k_proj", "v_proj"], "gate_up_proj": ["gate_proj", "up_proj"]}
    return config


@pytest.fixture
def play(monkeypatch):
    """Make vLLM's layers think that they are one of several ranks."""

    def as_rank(rank, ranks):
        from vllm.model_executor.layers import linear, vocab_parallel_embedding

        for module in (linear, vocab_parallel_embedding):
            monkeypatch.setattr(module, "get_tensor_model_parallel_rank", lambda: rank)
            monkeypatch.setattr(module, "get_tensor_model_parallel_world_size", lambda: ranks)

    return as_rank


def make(role, config, biased):
    from vllm.model_executor.layers.linear import MergedColumnParallelLinear, QKVParallelLinear, RowParallelLinear
    from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead, VocabParallelEmbedding

    common = dict(quant_config=config, params_dtype=torch.float32)
    linear = dict(bias=biased, return_bias=False, **common)
    return {
        "qkv": lambda: QKVParallelLinear(48, 16, 4, 2, prefix=BLOCK + "self_attn.qkv_proj", **linear),
        "gate_up": lambda: MergedColumnParallelLinear(48, [96, 96], prefix=BLOCK + "mlp.gate_up_proj", **linear),
        "o": lambda: RowParallelLinear(64, 48, prefix=BLOCK + "self_attn.o_proj", **linear),  # nothing to sum over: one process
        "down": lambda: RowParallelLinear(96, 48, prefix=BLOCK + "mlp.down_proj", reduce_results=False, skip_bias_add=True, **linear),
        "lm_head": lambda: ParallelLMHead(97, 48, prefix="lm_head", **common),
        "embedding": lambda: VocabParallelEmbedding(97, 48, **common),
    }[role]()


STORED = {  # of each of vLLM's layers: the stored layers, and what vLLM calls them when it hands their tensors over
    "qkv": {"q": BLOCK + "self_attn.q_proj", "k": BLOCK + "self_attn.k_proj", "v": BLOCK + "self_attn.v_proj"},
    "gate_up": {0: BLOCK + "mlp.gate_proj", 1: BLOCK + "mlp.up_proj"},
    "o": {None: BLOCK + "self_attn.o_proj"},
    "down": {None: BLOCK + "mlp.down_proj"},
    "lm_head": {None: "lm_head"},
    "embedding": {None: "model.embed_tokens"},
}


def fill(role, layer, tensors):
    for part, module in STORED[role].items():
        for name, tensor in tensors.items():
            if name.startswith(module + "."):
                parameter = layer.get_parameter(name.removeprefix(module + "."))
                parameter.weight_loader(parameter, tensor, *([] if part is None else [part]))
    layer.quant_method.process_weights_after_loading(layer)
    return layer


def close(got, expected):
    return float((got - expected).norm() / expected.norm()) < 1e-6


@pytest.mark.parametrize("case", list(CASES))
def test_every_layer_of_every_rank(engine, checkpoint, play, case):
    folder = checkpoint(case)
    config, tensors, biased = vllm_config(folder), load_file(folder / "model.safetensors"), case == "biased"
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    generator = torch.Generator().manual_seed(0)
    x = {width: torch.randn(2, 5, width, generator=generator) for width in (48, 64, 96)}
    ids = torch.arange(97).view(1, 97)
    with torch.inference_mode():
        expected = {role: [model.get_submodule(name) for name in parts.values()] for role, parts in STORED.items()}
        for ranks in (1, 2, 4):
            sums = {"o": 0.0, "down": 0.0, "embedding": 0.0}
            logits = []
            for rank in range(ranks):
                play(rank, ranks)
                for role, width in (("qkv", 48), ("gate_up", 48)):
                    parts = [module(x[width]) for module in expected[role]]
                    cuts = [ranks, min(ranks, 2), min(ranks, 2)] if role == "qkv" else [ranks, ranks]
                    mine = torch.cat([part.chunk(cut, -1)[rank * cut // ranks] for part, cut in zip(parts, cuts, strict=True)], -1)
                    assert close(fill(role, make(role, config, biased), tensors)(x[width]), mine)
                for role, width in (("o", 64), ("down", 96)):
                    if role == "down" and ranks == 4:  # 24 of 96 inputs are no whole groups of 16
                        continue
                    layer = fill(role, make(role, config, biased), tensors)
                    sums[role] += layer(x[width].chunk(ranks, -1)[rank])
                head = fill("lm_head", make("lm_head", config, False), tensors)
                logits.append(head.quant_method.apply(head, x[48]))
                table = fill("embedding", make("embedding", config, False), tensors)
                local = ids - table.shard_indices.org_vocab_start_index
                inside = (local >= 0) & (local < table.num_org_embeddings_per_partition)
                sums["embedding"] += table.quant_method.embedding(table, local * inside) * inside[..., None]
            for role, width in (("o", 64), ("down", 96)):
                module = expected[role][0]
                bias = module.bias.float() if biased and role == "down" else 0.0  # of o, rank 0 has added it
                assert (role == "down" and ranks == 4) or close(sums[role] + bias, module(x[width]))
            assert close(torch.cat(logits, -1)[..., :97], model.lm_head(x[48]))
            assert torch.equal(sums["embedding"], model.model.embed_tokens(ids))


def test_what_never_came_is_named(engine, checkpoint):
    folder = checkpoint("biased")
    config, tensors = vllm_config(folder), load_file(folder / "model.safetensors")
    for missing in ("self_attn.k_proj.zeros", "self_attn.v_proj.bias", "self_attn.q_proj.salient_scales"):
        rest = {name: tensor for name, tensor in tensors.items() if name != BLOCK + missing}
        with pytest.raises(ValueError, match=f"tensor '{BLOCK}{missing}' is missing"):
            fill("qkv", make("qkv", config, True), rest)


def test_a_local_checkpoint_is_checked_whole(engine, checkpoint):
    from safetensors.torch import save_file

    folder = checkpoint("biased")
    config, file = vllm_config(folder), folder / "model.safetensors"
    config.maybe_update_config(str(folder))
    tensors = load_file(file)
    save_file({name: tensor for name, tensor in tensors.items() if name != "model.norm.weight"}, file)
    with pytest.raises(ValueError, match=r"tensor 'model.norm.weight' is missing"):
        config.maybe_update_config(str(folder), hf_config=None, revision=None)


def test_a_rank_count_that_does_not_divide_is_refused(engine, checkpoint, play):
    config = vllm_config(checkpoint("biased"))
    play(0, 4)
    with pytest.raises(ValueError, match=r"mlp.down_proj: its 96 inputs in groups of 16 cannot be cut into 4 parts; .* are 1, 2, 3$"):
        make("down", config, True)


def test_layers_of_different_forms_are_not_joined(engine, checkpoint):
    folder = checkpoint("biased")
    config = vllm_config(folder)
    config.config.layouts["self_attn.k_proj"]["bits"] = 3
    with pytest.raises(ValueError, match=r"k_proj and .*q_proj are stored in different forms, but vLLM computes them as one layer, .*qkv_proj"):
        make("qkv", config, True)
    del config.config.layouts["mlp.gate_proj"]
    with pytest.raises(ValueError, match=r"up_proj and .*gate_proj are stored in different forms"):
        make("gate_up", config, True)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(colour="red"), "unknown key 'colour'"),
        (dict(layouts=None), "the key 'layouts' is missing"),
        (dict(format_version=99), "checkpoint format 99; this rosaq reads format 1"),
        (dict(hadamard_inputs=["mlp.down_proj"]), "by a Hadamard matrix at run time, which vLLM's layers cannot; load it with transformers"),
        (dict(rotated_norms=["input_layernorm"]), "rotates after each norm at run time, which vLLM's norms cannot; load it with transformers"),
        (dict(rotated_inputs=["self_attn.o_proj"]), "rotates the inputs of o_proj at run time, which vLLM's layers cannot; load it with"),
    ],
)
def test_a_config_that_vllm_cannot_serve_is_refused(engine, checkpoint, change, message):
    folder = checkpoint("biased")
    values = json.loads((folder / "config.json").read_text())
    stored = {**values["quantization_config"], **change}
    values["quantization_config"] = {key: value for key, value in stored.items() if value is not None}
    (folder / "config.json").write_text(json.dumps(values))
    with pytest.raises(ValueError, match=message):
        vllm_config(folder)


def test_dummy_weights_are_finite_on_every_rank(engine, checkpoint, play):
    """`--load-format dummy`: no tensor is handed over, and every layer computes something of about the size of its input."""
    from vllm.config import LoadConfig, VllmConfig, set_current_vllm_config

    config = vllm_config(checkpoint("biased"))
    for rank in range(2):
        play(rank, 2)
        with set_current_vllm_config(VllmConfig(load_config=LoadConfig(load_format="dummy"))):
            layers = {role: make(role, config, False) for role in STORED}
        for role, layer in layers.items():
            layer.quant_method.process_weights_after_loading(layer)
            if role == "embedding":
                y = layer.quant_method.embedding(layer, torch.arange(8))
            else:
                y = layer.quant_method.apply(layer, torch.randn(5, {"o": 32, "down": 48}.get(role, 48)))
            assert y.isfinite().all() and 0.001 < float(y.std()) < 10
