"""The golden checkpoint: its bytes may change only with the format version."""

import hashlib
import json
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from rosaq import Recipe
from rosaq.checkpoint import FORMAT_VERSION
from rosaq.engines.loading import verify_checkpoint

GOLDEN = Path(__file__).parent / "golden"
sys.path.insert(0, str(GOLDEN))


def test_this_version_writes_the_golden_bytes(tmp_path):
    import make

    make.make(tmp_path / "out")
    kept, made = GOLDEN / "checkpoint", tmp_path / "out"
    config = json.loads((kept / "config.json").read_text())["quantization_config"]
    assert config["format_version"] == FORMAT_VERSION == 1
    before, after = load_file(kept / "model.safetensors"), load_file(made / "model.safetensors")
    assert before.keys() == after.keys()
    different = [name for name in before if not torch.equal(before[name], after[name])]
    assert different == []
    assert (kept / "model.safetensors").read_bytes() == (made / "model.safetensors").read_bytes()
    again = json.loads((made / "config.json").read_text())["quantization_config"]
    assert Recipe.from_dict(config.pop("recipe")) == Recipe.from_dict(again.pop("recipe")) == make.RECIPE
    assert again == config


def test_the_golden_checkpoint_is_small_whole_and_reads_as_ever():
    import make

    file = GOLDEN / "checkpoint" / "model.safetensors"
    assert file.stat().st_size < 12_000
    recorded = json.loads((GOLDEN / "checkpoint" / "rosaq.json").read_text())["files"]["model.safetensors"]["sha256"]
    assert hashlib.sha256(file.read_bytes()).hexdigest() == recorded
    verify_checkpoint(GOLDEN / "checkpoint")
    model = AutoModelForCausalLM.from_pretrained(GOLDEN / "checkpoint", dtype=torch.float32)
    with torch.inference_mode():
        got = model(make.IDS).logits[:, -1, :4].flatten()
    wanted = torch.tensor(json.loads((GOLDEN / "logits.json").read_text()))
    assert torch.allclose(got, wanted, atol=1e-3), got.tolist()
