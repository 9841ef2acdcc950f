"""transformers loads, saves and reloads a checkpoint, and refuses one that is not whole."""

import json
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load, load_file, save_file
from transformers import AutoModelForCausalLM

from rosaq import Calibration, load_recipe, quantize
from rosaq.engines.loading import load_model, verify_checkpoint
from rosaq.engines.transformers import RosaqConfig
from rosaq.linear import RosaqLinear

IDS = torch.arange(3, 43).view(2, 20)


@pytest.fixture
def checkpoint(saved, text_file, tmp_path):
    recipe = load_recipe("rosaq-paper").replace(group_size=16, salient=16, salient_per_head=4, salient_bits=8, embedding_bits="8")
    quantize(str(saved("llama-biased")), tmp_path / "out", recipe, Calibration(str(text_file), 2, 32), "cpu")
    return tmp_path / "out"


def logits(model):
    with torch.inference_mode():
        return model(IDS).logits


def edit(checkpoint, change):
    """Change the tensors of a checkpoint's only shard."""
    file = checkpoint / "model.safetensors"
    tensors = load(file.read_bytes())
    change(tensors)
    save_file(tensors, file, metadata={"format": "pt"})


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_save_and_reload_is_bit_for_bit(checkpoint, tmp_path, dtype):
    loaded = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=dtype)
    loaded.save_pretrained(tmp_path / "again")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "again", dtype=dtype)
    assert torch.equal(logits(loaded), logits(again))
    before, after = load_file(checkpoint / "model.safetensors"), load_file(tmp_path / "again" / "model.safetensors")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before if not before[name].dtype.is_floating_point or dtype == torch.float16)
    configs = [json.loads((folder / "config.json").read_text())["quantization_config"] for folder in (checkpoint, tmp_path / "again")]
    assert configs[0] == configs[1]


def test_stored_tensors_keep_their_types(checkpoint):
    loaded = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.bfloat16).to(torch.float32)
    layer = loaded.model.layers[0].self_attn.q_proj
    assert isinstance(layer, RosaqLinear)
    kinds = {name: tensor.dtype for name, tensor in layer.state_dict().items()}
    assert kinds == {name: dtype for name, (_, dtype) in layer.layout.tensors().items()}


def test_generate_goes_on_as_logits_say(checkpoint):
    loaded = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
    out = loaded.generate(IDS[:1], max_new_tokens=4, do_sample=False, eos_token_id=None)
    ids = IDS[:1]
    for _ in range(4):
        ids = torch.cat([ids, loaded(ids).logits[:, -1:].argmax(-1)], 1)
    assert torch.equal(out, ids)


def test_half_precision_stays_near_float32(checkpoint):
    exact = logits(AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32))
    for dtype, tolerance in ((torch.bfloat16, 4e-2), (torch.float16, 4e-2)):  # the CPU computes float16 products in bfloat16
        got = logits(AutoModelForCausalLM.from_pretrained(checkpoint, dtype=dtype)).float()
        assert float((got - exact).norm() / exact.norm()) < tolerance


def test_a_missing_tensor_is_named(checkpoint):
    edit(checkpoint, lambda tensors: tensors.pop("model.layers.1.mlp.up_proj.scales"))
    with pytest.raises(ValueError, match=r"tensor 'model.layers.1.mlp.up_proj.scales' is missing"):
        AutoModelForCausalLM.from_pretrained(checkpoint)


def test_an_unknown_tensor_is_named(checkpoint):
    edit(checkpoint, lambda tensors: tensors.update({"model.layers.0.mlp.up_proj.extra": torch.zeros(3)}))
    with pytest.raises(ValueError, match=r"model.safetensors: tensor 'model.layers.0.mlp.up_proj.extra' is unknown"):
        AutoModelForCausalLM.from_pretrained(checkpoint)


def test_a_wrong_shape_or_type_is_named(checkpoint):
    name = "model.layers.0.self_attn.k_proj.qweight"
    edit(checkpoint, lambda tensors: tensors.update({name: tensors[name][:, :-1].contiguous()}))
    with pytest.raises(ValueError, match=rf"tensor '{name}' has shape .*the recipe asks for"):
        AutoModelForCausalLM.from_pretrained(checkpoint)
    edit(checkpoint, lambda tensors: tensors.update({name: torch.zeros(32, 4)}))
    with pytest.raises(ValueError, match=rf"tensor '{name}'"):
        AutoModelForCausalLM.from_pretrained(checkpoint)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda q: q.update(format_version=99), "checkpoint format 99; this rosaq reads format 1"),
        (lambda q: q.update(colour="red"), "unknown key 'colour'"),
        (lambda q: q.pop("layouts"), "the key 'layouts' is missing"),
        (lambda q: q.update(layouts=3), "layouts is 3; it must be an object"),
        (lambda q: q.update(recipe=[]), r"recipe is \[\]; it must be an object"),
        (lambda q: q.update(calibration="pile"), "calibration is 'pile'; it must be an object"),
        (lambda q: q["recipe"].update(bits=7), "bits is 7; allowed are"),
        (lambda q: q["recipe"].update(colour="red"), "unknown key 'colour'; known are"),
        (lambda q: q["layouts"]["self_attn.q_proj"].update(bits=5), "the form of model.layers.0.self_attn.q_proj is not valid: bits is 5"),
        (lambda q: q["layouts"]["self_attn.q_proj"].update(group_size=32), "has shape"),
    ],
)
def test_a_config_that_is_not_ours_is_refused(checkpoint, change, message):
    config = json.loads((checkpoint / "config.json").read_text())
    change(config["quantization_config"])
    (checkpoint / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=message):
        AutoModelForCausalLM.from_pretrained(checkpoint)


@pytest.mark.parametrize("read", [load_model, verify_checkpoint, RosaqConfig.of])
def test_a_damaged_config_is_named_by_its_file(checkpoint, read):
    config = json.loads((checkpoint / "config.json").read_text())
    config["quantization_config"]["recipe"]["bits"] = 7
    (checkpoint / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=rf"{checkpoint / 'config.json'}: quantization_config.recipe: .*bits is 7"):
        read(str(checkpoint))


def test_importing_rosaq_is_enough(checkpoint):
    """In a new process, in the order that a user writes it."""
    code = (
        "import rosaq, torch\nfrom transformers import AutoModelForCausalLM\n"
        f"model = AutoModelForCausalLM.from_pretrained({str(checkpoint)!r})\n"
        "print(type(model.model.layers[0].mlp.up_proj).__name__, model.dtype)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split()[0] == "RosaqLinear"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_compiled_model_with_a_static_cache_generates_the_same(checkpoint, dtype):
    """The whole forward pass as one graph; without Inductor, which compiles for a minute and sees the same graph."""
    loaded = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=dtype)
    ask = dict(max_new_tokens=8, do_sample=False, eos_token_id=None)
    expected = loaded.generate(IDS[:1], **ask)
    loaded.forward = torch.compile(loaded.forward, backend="aot_eager", fullgraph=True)
    assert torch.equal(loaded.generate(IDS[:1], cache_implementation="static", **ask), expected)


def test_the_derivative_by_x_is_that_of_the_dequantized_weight(checkpoint):
    from rosaq.kernels import reference

    loaded = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
    for layer in (module for module in loaded.model.layers[0].modules() if isinstance(module, RosaqLinear)):
        x = torch.randn(3, layer.in_features, requires_grad=True)
        weights = torch.randn(3, layer.out_features)
        (layer(x) * weights).sum().backward()
        assert torch.allclose(x.grad, weights @ reference.dequantize(layer.layout, layer.tensors()), atol=1e-5)
        assert torch.equal(layer(x).detach(), layer(x.detach()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_lora_adapter_learns_on_top(checkpoint, tmp_path, dtype):
    from peft import LoraConfig, PeftModel, get_peft_model

    torch.manual_seed(0)
    before = load_file(checkpoint / "model.safetensors")
    base = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=dtype)
    model = get_peft_model(base, LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(5):
        loss = model(input_ids=IDS, labels=IDS).loss
        loss.backward()
        assert all(p.grad is not None for name, p in model.named_parameters() if "lora_B" in name)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0] - 0.3
    stored = base.state_dict()
    for name in (name for name in before if name.endswith("_proj.qweight")):
        assert torch.equal(stored[name.replace(".qweight", ".base_layer.qweight")], before[name])
    model.save_pretrained(tmp_path / "adapter")
    again = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(checkpoint, dtype=dtype), tmp_path / "adapter")
    with torch.inference_mode():
        assert torch.equal(again(input_ids=IDS).logits, model.eval()(input_ids=IDS).logits)


def test_copies_of_a_layer_are_layers_of_their_own(checkpoint):
    import copy

    layer = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32).model.layers[0].mlp.up_proj
    twin = copy.deepcopy(layer)
    twin.scales = 2 * twin.scales
    twin.salient_scales = 2 * twin.salient_scales
    twin.bias = 2 * twin.bias
    x = torch.randn(2, layer.in_features, requires_grad=True)
    assert torch.allclose(twin(x), 2 * layer(x), atol=1e-5)


def test_loading_makes_no_full_precision_copy(checkpoint, tmp_path):
    """Memory of a new process: 36 million weights are 73 MB in FP16 and 24 MB as stored."""
    from transformers import AutoConfig

    from rosaq.engines.dummy import dummy_config, write_dummy

    sizes = dict(hidden_size=512, intermediate_size=4096, num_hidden_layers=5, num_attention_heads=8, num_key_value_heads=8, vocab_size=512)
    config = AutoConfig.for_model("llama", tie_word_embeddings=False, **sizes)
    write_dummy(dummy_config(config, load_recipe("rosaq-int4"), torch.float16), tmp_path / "large")
    code = (
        "import re, rosaq, torch\nfrom pathlib import Path\nfrom transformers import AutoModelForCausalLM\n"
        "peak = lambda: 1024 * int(re.search(r'VmHWM:\\s+(\\d+)', Path('/proc/self/status').read_text())[1])\n"
        "load = lambda folder: AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float16, device_map='auto')\n"
        f"load({str(checkpoint)!r})\nPath('/proc/self/clear_refs').write_text('5')  # the peak is what it is now\n"
        f"before = peak()\nmodel = load({str(tmp_path / 'large')!r})\n"
        "for tensor in model.state_dict().values():\n    tensor.sum()  # on the CPU, tensors are the file's map until they are read\n"
        "print(peak() - before)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    stored, full = (tmp_path / "large" / "model.safetensors").stat().st_size, 2 * 5 * (4 * 512**2 + 3 * 512 * 4096)
    assert 0.9 * stored < int(done.stdout) < 0.6 * full
