"""q, k, v and gate, up as one product in transformers: the same numbers from fewer launches, whoever asks."""

import copy

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from rosaq import Calibration, kernels, load_recipe, quantize
from rosaq.engines import joined

IDS = torch.arange(3, 43).view(2, 20)
RECIPE = load_recipe("rosaq-int4").replace(group_size=16, salient=16, salient_per_head=4, salient_down=16)


@pytest.fixture
def checkpoint(saved, text_file, tmp_path):
    def make(family, recipe=RECIPE):
        quantize(str(saved(family)), tmp_path / "out", recipe, Calibration(str(text_file), 2, 32), "cpu")
        return tmp_path / "out"

    return make


@pytest.fixture
def on_cpu(monkeypatch):
    """Join on the CPU too, and count the products."""
    monkeypatch.setattr(joined, "DEVICES", ("cpu",))
    monkeypatch.setattr(joined, "KERNELS", kernels.kernel_names())
    calls, apply = [], kernels.apply
    monkeypatch.setattr(kernels, "apply", lambda *given: calls.append(given[3]) or apply(*given))
    return calls


def load(folder, dtype=torch.float32):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)


def alone(model):
    """The same model, every layer by itself."""
    for module in model.modules():
        if getattr(module, "joined", None) is not None:
            module.joined = None
    return model


def logits(model):
    with torch.inference_mode():
        return model(IDS).logits


def test_one_product_for_layers_with_the_same_input(family, checkpoint, on_cpu):
    folder = checkpoint(family)
    expected = logits(alone(load(folder)))
    before = len(on_cpu)
    model = load(folder)
    assert torch.allclose(logits(model), expected, atol=1e-5)
    assert before >= 2 * 7 and len(on_cpu) == 2 * before - 2 * 3
    ask = dict(max_new_tokens=4, do_sample=False, eos_token_id=None)
    assert torch.equal(model.generate(IDS, **ask), alone(load(folder)).generate(IDS, **ask))


def test_on_the_cpu_every_layer_computes_by_itself(checkpoint, monkeypatch):
    model = load(checkpoint("llama"))
    logits(model)
    layer = model.model.layers[0].mlp.gate_proj
    assert layer.joined is not None and layer.joined.build(torch.float32) is None


def test_the_compiler_sees_one_operation(checkpoint, on_cpu):
    model = load(checkpoint("llama-biased"))
    expected = logits(model)
    on_cpu.clear()
    model.forward = torch.compile(model.forward, backend="aot_eager", fullgraph=True)
    assert torch.equal(logits(model), expected)
    assert len(on_cpu) == 2 * 4


def test_whoever_asks_out_of_turn_computes_by_itself(checkpoint, on_cpu):
    attention = load(checkpoint("llama-biased")).model.layers[0].self_attn
    x = torch.randn(3, attention.q_proj.in_features)
    expected = [layer.alone(x) for layer in (attention.q_proj, attention.k_proj, attention.v_proj)]
    for order in ([0, 1, 2], [2, 1, 0], [1], [0, 2, 1, 2], [0, 0, 1, 2]):
        for index in order:
            layer = (attention.q_proj, attention.k_proj, attention.v_proj)[index]
            assert torch.allclose(layer(x), expected[index], atol=1e-5)
    attention.q_proj(x)
    x *= 2  # the kept outputs are of another input now
    assert torch.allclose(attention.k_proj(x), attention.k_proj.alone(x), atol=1e-5)
    assert torch.allclose(attention.v_proj(x.clone()), attention.v_proj.alone(x), atol=1e-5)


def test_nothing_is_kept_once_all_were_asked(checkpoint, on_cpu):
    model = load(checkpoint("llama"))
    logits(model)
    assert all(module.joined._kept is None for module in model.modules() if getattr(module, "joined", None) is not None)


def test_values_reach_the_cache_in_one_piece(checkpoint, on_cpu):
    attention = load(checkpoint("llama")).model.layers[0].self_attn
    x = torch.randn(3, 1, attention.q_proj.in_features)
    q, k, v = attention.q_proj(x), attention.k_proj(x), attention.v_proj(x)
    memory = [part.untyped_storage().data_ptr() for part in (q, k, v)]
    assert len(on_cpu) == 1 and memory[0] == memory[1] != memory[2]
    assert v.is_contiguous() and not k.is_contiguous()
    assert torch.allclose(v, attention.v_proj.alone(x), atol=1e-5)


def test_a_stored_tensor_that_changes_counts(checkpoint, on_cpu):
    model = load(checkpoint("llama"))
    layer, x = model.model.layers[0].mlp, torch.randn(2, model.config.hidden_size)
    before = layer.up_proj.alone(x)
    assert torch.allclose((layer.gate_proj(x), layer.up_proj(x))[1], before, atol=1e-5)
    layer.up_proj.scales = 2 * layer.up_proj.scales
    after = layer.up_proj.alone(x)
    assert not torch.allclose(after, before, atol=1e-2)
    assert torch.allclose((layer.gate_proj(x), layer.up_proj(x))[1], after, atol=1e-5)
    twin = copy.deepcopy(layer)  # a copy's layers compute by themselves, and by their own tensors
    twin.up_proj.scales = 2 * twin.up_proj.scales
    assert torch.allclose((layer.gate_proj(x), layer.up_proj(x))[1], after, atol=1e-5)
    assert torch.allclose((twin.gate_proj(x), twin.up_proj(x))[1], twin.up_proj.alone(x), atol=1e-5)


def test_gradients_go_through_each_layer(checkpoint, on_cpu):
    model = load(checkpoint("llama"))
    x = torch.randn(2, model.config.hidden_size, requires_grad=True)
    layer = model.model.layers[0].mlp
    (layer.gate_proj(x).sum() + 2 * layer.up_proj(x).sum()).backward()
    ones = torch.ones(2, layer.gate_proj.out_features)
    gate, up = (projection.dense_weight(torch.float32) for projection in (layer.gate_proj, layer.up_proj))
    assert torch.allclose(x.grad, ones @ gate + 2 * ones @ up, atol=1e-4)


def test_what_is_saved_is_what_was_loaded(checkpoint, on_cpu, tmp_path):
    folder = checkpoint("llama-biased")
    model = load(folder, torch.float16)
    logits(model)
    model.save_pretrained(tmp_path / "again")
    before, after = load_file(folder / "model.safetensors"), load_file(tmp_path / "again" / "model.safetensors")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name].to(before[name].dtype)) for name in before)


def test_layers_that_gather_their_inputs_stay_apart(checkpoint):
    model = load(checkpoint("llama", load_recipe("mixed").replace(group_size=16, salient=16, salient_per_head=4)))
    assert {module.joined for module in model.modules() if hasattr(module, "joined")} == {None}


def test_layers_whose_kernel_was_chosen_stay_apart(checkpoint, on_cpu):
    model = load(checkpoint("llama"))
    model.model.layers[0].mlp.up_proj.allow_kernels(["dequantized"])
    logits(model)
    assert model.model.layers[0].mlp.gate_proj.joined.build(torch.float32) is None
