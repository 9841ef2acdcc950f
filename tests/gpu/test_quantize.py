"""Quantizing on the GPU and loading there: the same checkpoint as on the CPU, up to rounding at the border of a step."""

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from rosaq import Calibration, load_recipe, measure, open_source, quantize

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
