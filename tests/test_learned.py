"""SpinQuant: what is learned is orthogonal, better on text not learned from, and the loss is that of the packed model."""

import itertools
import json

import pytest
import torch
from transformers import AutoModelForCausalLM

from conftest import random_model
from rosaq import Calibration, learned, load_recipe, measure, open_source, quantize
from rosaq.basis import draw_bases
from rosaq.clock import no_progress
from rosaq.curve import plot_learning
from rosaq.learned import QuantizedModel, cayley_step, learn, orthonormal
from rosaq.plan import make_plan
from rosaq.rotation import random_bases


def recipe(**changes):
    return load_recipe("spinquant").replace(**{**dict(group_size=16, bits=3, learning_steps=2), **changes})


def cross_entropy(model, windows):
    with torch.inference_mode():
        logits = model(windows).logits[:, :-1].float()
    return float(torch.nn.functional.cross_entropy(logits.flatten(0, 1), windows[:, 1:].flatten()))


def quantized_model(source, chosen, tokens):
    return QuantizedModel(source, chosen, make_plan(chosen, source.architecture).blocks[0], tokens, "cpu")


def sampled(family, windows, tokens):
    """Text that the model of `saved` is good at: its own."""
    torch.manual_seed(0)
    first = torch.randint(3, 97, (windows, 1))
    new = dict(max_new_tokens=tokens - 1, min_new_tokens=tokens - 1, pad_token_id=0, eos_token_id=None)
    return random_model(family).generate(first, do_sample=True, **new)


@pytest.mark.parametrize("changes", [{}, dict(down_rotation="hadamard"), dict(head_rotation="none"), dict(head_rotation="random")])
def test_the_loss_is_that_of_the_packed_model(changes, family, saved, tmp_path):
    source, chosen = open_source(str(saved(family))), recipe(embedding_bits="16", **changes)
    windows = sampled(family, 4, 32)
    statistics = measure(source, windows, "cpu")
    report = quantize(source, tmp_path / "out", chosen, statistics, "cpu")
    packed = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    (found,) = statistics.learned.values()
    with torch.no_grad():
        heads = None if found.heads is None else found.heads.float()
        loss = float(quantized_model(source, chosen, 32).loss(windows, found.residual.float(), heads))
    wanted = cross_entropy(packed, windows)
    assert loss == pytest.approx(wanted, abs=3e-4)  # tables are FP16 in the file
    assert abs(loss - cross_entropy(random_model(family), windows)) > 4 * abs(loss - wanted)  # and the rounding is in it
    assert report.learning == found.record and "learning" in report.seconds


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3"])
def test_learned_beats_the_random_start_on_text_not_learned_from(family, saved):
    source, chosen = open_source(str(saved(family))), recipe(learning_steps=40)
    windows = sampled(family, 48, 48)
    start = draw_bases(chosen, source.architecture)
    found = learn(quantized_model(source, chosen, 48), start, windows, chosen, no_progress)
    record = found.record
    assert record["windows"] == 45 and record["held_out_windows"] == 3 and len(record["losses"]) == 40
    assert record["held_out_after"] < record["held_out_before"] - 0.02
    assert sum(record["losses"][-10:]) < sum(record["losses"][:10])
    for before, after in zip(start, (found.residual, found.heads), strict=True):
        unit = torch.eye(before.shape[-1], dtype=torch.float64)
        assert float((after.mT @ after - unit).abs().max()) < 1e-12
        assert float((after - before).norm()) > 0.1
    assert record["orthogonality_error"] < 1e-12


def test_without_rounding_the_rotations_make_no_difference(family, saved, monkeypatch):
    """Computational invariance, through the differentiable model: no loss changes, no gradient along the manifold."""
    monkeypatch.setattr(learned, "round_to_nearest", lambda weight, layout: weight)
    source, chosen = open_source(str(saved(family))), recipe(down_rotation="hadamard")
    windows = sampled(family, 2, 24)
    residual, heads = (basis.float().requires_grad_() for basis in draw_bases(chosen, source.architecture))
    loss = quantized_model(source, chosen, 24).loss(windows, residual, heads)
    assert loss.item() == pytest.approx(cross_entropy(random_model(family), windows), rel=1e-5)
    loss.backward()
    for basis in (residual, heads):
        skew = basis.grad @ basis.mT - basis @ basis.grad.mT
        assert skew.norm().item() < 2e-3 * basis.grad.norm().item()


def test_a_cayley_step_descends_and_stays_orthogonal():
    """Procrustes: the rotation that takes A to Q A is found from another of the same handedness."""
    wanted, other = random_bases("random", 2, 12, torch.Generator().manual_seed(0))
    other = other if float(torch.linalg.det(other @ wanted)) > 0 else other * torch.tensor([-1.0] + [1.0] * 11)
    a = torch.randn(12, 40, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    basis, losses = other, []
    for _ in range(300):
        difference = basis @ a - wanted @ a
        losses.append(float(difference.square().mean()))
        basis = cayley_step(basis, 2 * difference @ a.T / difference.numel(), 1.5)
    assert all(after < before * (1 + 1e-9) for before, after in itertools.pairwise(losses))
    assert losses[-1] < 1e-3 * losses[0]
    assert float((basis.T @ basis - torch.eye(12)).abs().max()) < 1e-12
    bent = basis + 1e-4 * torch.randn(12, 12, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    assert float((orthonormal(bent).T @ orthonormal(bent) - torch.eye(12)).abs().max()) < 1e-6


def test_recipes_share_what_they_learn(saved, text_file, tmp_path, monkeypatch):
    source = open_source(str(saved("llama")))
    statistics = measure(source, Calibration(str(text_file), 4, 32), "cpu")
    reports = [quantize(source, tmp_path / str(n), recipe(rounding=r), statistics, "cpu") for n, r in enumerate(("nearest", "gptq"))]
    assert len(statistics.learned) == 1 and reports[0].learning == reports[1].learning
    monkeypatch.setattr("rosaq.job.learn", lambda *_: pytest.fail("learned again"))
    quantize(source, tmp_path / "same", recipe(), statistics, "cpu")
    assert (tmp_path / "same" / "model.safetensors").read_bytes() == (tmp_path / "0" / "model.safetensors").read_bytes()
    with pytest.raises(pytest.fail.Exception, match="learned again"):
        quantize(source, tmp_path / "other", recipe(seed=1), statistics, "cpu")


def test_learning_is_seeded(saved, text_file, tmp_path):
    source, calibration = open_source(str(saved("llama"))), Calibration(str(text_file), 6, 32)
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        quantize(source, tmp_path / name, recipe(seed=seed), calibration, "cpu")
    bytes_of = {name: (tmp_path / name / "model.safetensors").read_bytes() for name in "abc"}
    assert bytes_of["a"] == bytes_of["b"] != bytes_of["c"]


def test_the_report_has_the_losses_and_they_are_drawn(saved, text_file, tmp_path):
    pytest.importorskip("matplotlib")
    quantize(str(saved("llama")), tmp_path / "out", recipe(), Calibration(str(text_file), 4, 32), "cpu")
    learning = json.loads((tmp_path / "out" / "rosaq.json").read_text())["report"]["learning"]
    assert len(learning["losses"]) == 2 and learning["held_out_windows"] == 1
    plot_learning([tmp_path / "out"], tmp_path / "loss.svg")
    picture = (tmp_path / "loss.svg").read_text()
    assert picture.count("<path") > 10
    quantize(open_source(str(tmp_path / "llama-original")), tmp_path / "rtn", load_recipe("rtn"), Calibration(str(text_file), 4, 32), "cpu")
    with pytest.raises(ValueError, match="its rotation was not learned"):
        plot_learning([tmp_path / "rtn"], tmp_path / "none.svg")


def test_one_window_is_refused(saved, tmp_path):
    with pytest.raises(ValueError, match="cannot be learned from 1 calibration window"):
        quantize(str(saved("llama")), tmp_path / "out", recipe(), Calibration("self", 1, 16), "cpu")
    assert not (tmp_path / "out").exists()
