"""Quantizing on the GPU and loading there: the same checkpoint as on the CPU, up to rounding at the border of a step."""

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from rosaq import Calibration, Means, load_recipe, measure, open_source, quantize
from rosaq.kernels.reference import dequantize
from rosaq.layout import LinearLayout
from rosaq.rounding.linear import Rounding, quantize_linear
from rosaq.skeleton import full_model

pytestmark = pytest.mark.gpu
IDS = torch.arange(3, 43).view(2, 20)


@pytest.mark.parametrize("name", ["rosaq-paper", "rosaq-nearest", "rosaq-paper-per-layer", "mixed", "rtn", "quarot", "quarot-gptq", "quarot-r4"])
def test_the_gpu_makes_the_cpus_checkpoint(name, saved, text_file, tmp_path):
    source = open_source(str(saved("llama-biased")))
    recipe = load_recipe(name)
    recipe = recipe.replace(group_size=16, salient=16 if recipe.salient else None, salient_per_head=4 if recipe.salient else None)
    calibration = Calibration(str(text_file), 4, 32)
    for device in ("cpu", "cuda"):
        report = quantize(source, tmp_path / device, recipe, measure(source, calibration, device), device)
    assert report.peak_device_bytes > 0
    cpu, cuda = (load_file(tmp_path / device / "model.safetensors") for device in ("cpu", "cuda"))
    assert cpu.keys() == cuda.keys()
    logits = {}
    for device in ("cpu", "cuda"):
        model = AutoModelForCausalLM.from_pretrained(tmp_path / device, dtype=torch.float32, device_map="cuda")
        with torch.inference_mode():
            logits[device] = model(IDS.cuda()).logits.cpu()
    assert float((logits["cpu"] - logits["cuda"]).norm() / logits["cpu"].norm()) < 0.05


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_on_the_gpu_stays_near_float32(dtype, saved, text_file, tmp_path):
    recipe = load_recipe("rosaq-nearest").replace(group_size=16, salient=16, salient_per_head=4, embedding_bits="8")
    quantize(str(saved("llama")), tmp_path / "out", recipe, Calibration(str(text_file), 4, 32), "cuda")
    exact = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32, device_map="cuda")
    half = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=dtype, device_map="cuda")
    with torch.inference_mode():
        wanted, got = exact(IDS.cuda()).logits, half(IDS.cuda()).logits.float()
    assert float((got - wanted).norm() / wanted.norm()) < 0.03
    generated = half.generate(IDS[:1].cuda(), max_new_tokens=4, do_sample=False, eos_token_id=None)
    assert generated.shape == (1, 24)


@pytest.mark.parametrize("name", ["spinquant", "spinquant-r4"])
def test_rotations_are_learned_on_the_gpu_the_same_every_time(name, saved, tmp_path):
    """In bfloat16 and TF32, where the held-out loss must still fall; on text that the model itself has sampled."""
    source, reports = open_source(str(saved("llama"))), []
    recipe = load_recipe(name).replace(group_size=16, bits=3, learning_steps=30)
    for run in ("a", "b"):
        reports.append(quantize(source, tmp_path / run, recipe, Calibration("self", 48, 48), "cuda"))
    learning = [report.learning for report in reports]
    assert learning[0] == learning[1]
    assert (tmp_path / "a" / "model.safetensors").read_bytes() == (tmp_path / "b" / "model.safetensors").read_bytes()
    assert learning[0]["held_out_after"] < learning[0]["held_out_before"] and learning[0]["orthogonality_error"] < 1e-12


@pytest.mark.parametrize(("act_order", "refinement"), [(False, 0), (True, 0), (False, 2)])
def test_gptq_rounds_on_the_gpu_as_on_the_cpu(act_order, refinement):
    """Groups of two lengths: all but a few codes at the border of a step are equal."""
    generator = torch.Generator().manual_seed(0)
    layout = LinearLayout(24, 320, 4, 64, blocks=2, salient=16)  # groups of 64, 64, 16 in each block
    for seed in (0, 1):
        weight = torch.randn(24, 320, generator=generator)
        x = torch.randn(2000, 40, generator=generator) @ torch.randn(40, 320, generator=generator) + 0.3 * torch.randn(2000, 320, generator=generator)
        moment, rounding = x.T @ x / len(x), Rounding(gptq=True, act_order=act_order, clipping="mse" if refinement else "none", refinement=refinement)
        cpu = dequantize(layout, quantize_linear(weight, layout, None, moment, rounding))
        gpu = dequantize(layout, {k: v.cpu() for k, v in quantize_linear(weight.cuda(), layout, None, moment.cuda(), rounding).items()})
        if not refinement:  # one other code changes all scales of its row
            assert float((cpu != gpu).float().mean()) < 0.05, seed
        losses = [float(((weights - weight) @ moment * (weights - weight)).sum()) for weights in (cpu, gpu)]
        assert losses[1] == pytest.approx(losses[0], rel=0.01)


@pytest.mark.parametrize("target", [0.0, 4.9])
def test_the_recommended_recipe_makes_the_same_bytes_every_time(target, saved, text_file, tmp_path):
    """Gradients, searched ranges, refined codes and an allocation on the GPU; the model that comes out is near the original."""
    source = open_source(str(saved("llama")))
    recipe = load_recipe("rosaq-int4").replace(group_size=32, salient=16, salient_per_head=8, salient_down=16, target_bits=target)
    for run in ("a", "b"):
        quantize(source, tmp_path / run, recipe, Calibration(str(text_file), 8, 32), "cuda")
    assert (tmp_path / "a" / "model.safetensors").read_bytes() == (tmp_path / "b" / "model.safetensors").read_bytes()
    with torch.inference_mode():
        got = AutoModelForCausalLM.from_pretrained(tmp_path / "a", dtype=torch.float32, device_map="cuda")(IDS.cuda()).logits
        wanted = full_model(source, torch.float32, "cuda")(IDS.cuda()).logits
    assert float((got - wanted).norm() / wanted.norm()) < 0.3


def test_a_bound_on_the_gpus_memory_holds(saved, text_file, tmp_path):
    recipe = load_recipe("rosaq-paper").replace(group_size=16, salient=16, salient_per_head=4)
    model, text = str(saved("llama", hidden_size=512, intermediate_size=2048, num_hidden_layers=3)), Calibration(str(text_file), 64, 64)
    torch.cuda.empty_cache()
    with pytest.raises(ValueError, match=r"cuda: out of memory with .* GiB held: max-device-memory is 0.02 GiB"):
        quantize(model, tmp_path / "out", recipe, text, "cuda", means=Means(max_device_memory=20 << 20))
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    report = quantize(model, tmp_path / "out", recipe, text, "cuda", means=Means(max_device_memory=1 << 30))
    assert 0 < report.peak_device_bytes <= torch.cuda.max_memory_reserved() <= 1 << 30
    quantize(model, tmp_path / "free", recipe, text, "cuda")
    files = [tmp_path / name / "model.safetensors" for name in ("out", "free")]
    assert files[0].read_bytes() == files[1].read_bytes()
