"""The examples run, on a tiny model; those that are commands answer --help. What they measure is in docs/results.md and docs/log.md."""

import json
import runpy
import subprocess
import sys

import pytest
import torch
from transformers import AutoModelForCausalLM

from conftest import random_model, tokenizer
from pages import ROOT
from rosaq import Calibration, load_recipe, quantize

EXAMPLES = sorted(path.name for path in (ROOT / "examples").glob("*.py"))


@pytest.fixture
def model(tmp_path):
    """Wide enough for the sizes that the examples name."""
    sizes = dict(vocab_size=320, hidden_size=256, intermediate_size=384, num_attention_heads=4, num_key_value_heads=2, head_dim=64)
    random_model("llama", **sizes).save_pretrained(tmp_path / "model")
    tokenizer(320).save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def run(monkeypatch, name, *arguments):
    monkeypatch.setattr(sys, "argv", [name, *map(str, arguments)])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.syspath_prepend(ROOT / "examples")  # as Python does for a script
    runpy.run_path(str(ROOT / "examples" / name), run_name="__main__")


def test_smollm2(model, tmp_path, monkeypatch, capsys):
    run(monkeypatch, "smollm2.py", "--model", model, "--samples", 2, "--seq-len", 32, "--out", tmp_path / "out")
    shown = capsys.readouterr().out
    for word in ("bits per weight", "largest relative error", ".html", "s in all"):
        assert word in shown, shown
    assert (tmp_path / "out" / "checkpoint" / "rosaq.json").is_file() and list((tmp_path / "out" / "inspection").glob("*.png"))


def test_hub_7b(model, text_file, tmp_path, monkeypatch, capsys):
    sizes = ["--samples", 2, "--seq-len", 32, "--window", 32, "--calibration", text_file, "--text", text_file, "--device", "cpu"]
    run(monkeypatch, "hub_7b.py", model, "--out", tmp_path / "out", "--max-memory", "64GiB", *sizes)
    figures = json.loads((tmp_path / "out.figures.json").read_text())
    assert figures["plan"]["checkpoint_bytes"] == figures["run"]["checkpoint_bytes"]
    assert len(figures["errors"]) == 4 and 0 < figures["text"]["kl_divergence"] < 1
    assert "KL divergence" in capsys.readouterr().out


def test_planted_outliers_cost_mixed_and_not_rosaq(model, text_file, tmp_path, monkeypatch):
    run(monkeypatch, "planted_outliers.py", model, tmp_path / "planted", "--spread", 1.5)
    ids, errors, sizes = torch.arange(40).view(2, 20), {}, dict(bits=3, group_size=64, salient=16, salient_per_head=4, down_scaling="none")

    def logits(folder):
        with torch.no_grad():
            return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)(ids).logits

    wanted = logits(model)
    assert (logits(tmp_path / "planted") - wanted).abs().max() < 1e-4 * wanted.abs().max()
    for folder in (model, tmp_path / "planted"):
        for name in ("mixed", "rosaq-paper"):
            place = tmp_path / f"{name}-{folder.name}"
            quantize(str(folder), place, load_recipe(name).replace(**sizes), Calibration(str(text_file), 4, 32), "cpu")
            errors[name, folder.name] = float((logits(place) - wanted).norm() / wanted.norm())
    assert errors["mixed", "planted"] > 1.3 * errors["mixed", "model"], errors
    assert errors["rosaq-paper", "planted"] == pytest.approx(errors["rosaq-paper", "model"], rel=0.05), errors


@pytest.fixture
def data(tmp_path):
    """A folder with a test text of some windows of 2048 characters, which are the tokenizer's tokens."""
    generator = torch.Generator().manual_seed(3)
    (tmp_path / "wiki.test.raw").write_text("".join(chr(97 + i) for i in torch.randint(26, (5000,), generator=generator)))
    return tmp_path


def test_rotated(model, text_file, data, monkeypatch, capsys):
    """The model is the same in the rotated basis, up to FP16."""
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, "max_position_embeddings": 2048}))
    run(monkeypatch, "rotated.py", model, text_file, data, "--samples", 2, "--seq-len", 32)
    original, rotated = (float(line.split()[-1]) for line in capsys.readouterr().out.splitlines()[-2:])
    assert rotated == pytest.approx(original, rel=2e-3) and original > 10


def test_learned(model, text_file, data, tmp_path, monkeypatch, capsys):
    sizes = ["--bits", 4, "--samples", 4, "--seq-len", 32, "--window", 64, "--every", 20, "--steps", 2]
    run(monkeypatch, "learned.py", model, text_file, data, tmp_path / "out", "--recipes", "quarot", "spinquant", *sizes)
    shown = capsys.readouterr().out
    assert shown.count("bits  perplexity") == 2 and "kept aside" in shown
    assert (tmp_path / "out" / "loss-INT4.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("name", [name for name in EXAMPLES if name != "chat.py"])
def test_help(name, monkeypatch, capsys):
    with pytest.raises(SystemExit) as stop:
        run(monkeypatch, name, "--help")
    assert not stop.value.code and capsys.readouterr().out.startswith("usage:")


def test_chat_answers_help_and_says_that_nothing_is_there():
    pytest.importorskip("openai")
    command = [sys.executable, str(ROOT / "examples" / "chat.py")]
    assert "rosaq serve" in subprocess.run([*command, "--help"], capture_output=True, text=True, check=True).stdout
    done = subprocess.run([*command, "--url", "http://localhost:9/v1", "hello"], capture_output=True, text=True, check=False)
    assert done.returncode == 1 and done.stderr.startswith("nothing answers at http://localhost:9/v1")
