"""Distillation on the GPU, in bfloat16: the divergence falls there as on the CPU, and the checkpoint is whole."""

import pytest
import torch
from transformers import AutoModelForCausalLM

from rosaq import Calibration, load_recipe, quantize
from rosaq.distillation import Settings, distill
from rosaq.engines.loading import verify_checkpoint

pytestmark = pytest.mark.gpu
IDS = torch.arange(3, 43).view(2, 20)


@pytest.mark.parametrize(("name", "rate"), [("rosaq-nearest", 0), ("rosaq-nearest", 1e-2), ("mixed", 0)])
def test_the_divergence_falls_on_the_gpu(name, rate, saved, text_file, tmp_path):
    original = str(saved("qwen2"))
    recipe = load_recipe(name).replace(bits=3, group_size=16, salient=16, salient_per_head=4, embedding_bits="8")
    quantize(original, tmp_path / "packed", recipe, Calibration(str(text_file), 4, 32), "cpu")
    text, settings = Calibration(str(text_file), 64, 48), Settings(epochs=4, learning_rates=(1e-2, 1e-3, 1e-2, rate))
    reports = [distill(tmp_path / "packed", original, tmp_path / device, text, settings, device) for device in ("cpu", "cuda")]
    verify_checkpoint(tmp_path / "cuda")
    assert reports[1].after["kl_divergence"] < 0.4 * reports[1].before["kl_divergence"]
    assert reports[1].before["kl_divergence"] == pytest.approx(reports[0].before["kl_divergence"], rel=0.2)  # products are rounded to bfloat16
    models = [AutoModelForCausalLM.from_pretrained(tmp_path / device, dtype=torch.float32, device_map="cuda") for device in ("cpu", "cuda")]
    with torch.inference_mode():
        cpu, cuda = (model(IDS.cuda()).logits for model in models)
    assert float((cpu - cuda).norm() / cpu.norm()) < 0.1
