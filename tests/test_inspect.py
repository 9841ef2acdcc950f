"""`rosaq inspect`: its numbers against direct computation on a tiny model, its files, its refusals."""

import json
import re

import pytest
import torch

from conftest import random_model, tokenizer
from rosaq import Calibration, load_recipe, measure, open_source, quantize
from rosaq.activations import Activations
from rosaq.architecture import LINEARS
from rosaq.clock import no_progress
from rosaq.engines.loading import load_model
from rosaq.inspection import plots
from rosaq.inspection.channels import outliers, top_channels
from rosaq.inspection.errors import recipe_errors, relative_errors
from rosaq.inspection.observation import View, observe
from rosaq.inspection.page import table8, write
from rosaq.inspection.report import Settings, inspect, recorded_calibration
from rosaq.sensitivity import held_states

SETTINGS = Settings(salient=8, salient_per_head=4, top=3)
SALIENT = {"salient": 16, "salient_per_head": 4, "salient_down": 0}  # splitting W_down would reorder the rows of gate
SIZES = {"group_size": 16, "salient": 16, "salient_per_head": 4}


@pytest.fixture
def calibration(text_file):
    return Calibration(str(text_file), 3, 32)


@pytest.fixture
def original(saved):
    return open_source(str(saved("llama")))


def inputs_of(model, windows, module):
    """Inputs of a linear layer of a model as it is."""
    kept = []
    handle = model.get_submodule(module).register_forward_pre_hook(lambda _, arguments: kept.append(arguments[0].detach().flatten(0, -2)))
    with torch.no_grad():
        model(windows)
    handle.remove()
    return torch.cat(kept).double()


def test_views_are_the_inputs_in_each_basis(original, calibration):
    statistics = measure(original, calibration, "cpu")
    observed = list(observe(original, statistics, "cpu", no_progress))
    model = random_model("llama")
    for site, role in (("attn_in", "q"), ("mlp_in", "up"), ("attn_out", "o"), ("mlp_out", "down")):
        x = inputs_of(model, statistics.windows, f"model.layers.1.{LINEARS[role]}")
        own = observed[1][site].views["own"]
        for found, wanted in ((own.magnitude, x.abs()), (own.energy, x**2), (own.fourth, x**4)):
            torch.testing.assert_close(found.double(), wanted.mean(0), rtol=1e-4, atol=1e-6)
    layer = model.model.layers[1]
    x = inputs_of(model, statistics.windows, f"model.layers.1.{LINEARS['q']}") / layer.input_layernorm.weight.detach().double()
    torch.testing.assert_close(observed[1]["attn_in"].moment.double(), x.T @ x / len(x), rtol=1e-4, atol=1e-5)
    values, vectors = torch.linalg.eigh(x.T @ x / len(x))
    local = observed[1]["attn_in"].views["per-layer"]
    torch.testing.assert_close(local.energy, values.flip(0), rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(local.magnitude[:3].double(), (x @ vectors.flip(1)).abs().mean(0)[:3], rtol=1e-3, atol=1e-4)
    for view in ("normalised", "global", "per-layer"):  # a rotation keeps the energy, and RMSNorm makes it K
        assert float(observed[1]["attn_in"].views[view].energy.sum()) == pytest.approx(48, rel=1e-3)


def test_outliers():
    x = torch.randn(20000, 64, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    even = outliers(View(x.abs().mean(0), (x**2).mean(0), (x**4).mean(0)), 16)
    assert even.kurtosis == pytest.approx(3, rel=0.05) and even.max_over_median == pytest.approx(1, rel=0.05)
    assert even.top_energy == pytest.approx(0.25, rel=0.05)
    x[:, 5] *= 50
    view = View(x.abs().mean(0), (x**2).mean(0), (x**4).mean(0))
    planted = outliers(view, 1)
    assert planted.kurtosis > 100 and planted.max_over_median == pytest.approx(50, rel=0.05)
    assert planted.top_energy == pytest.approx(2500 / 2563, rel=0.01)
    assert outliers(view, 1, blocks=2).top_energy == pytest.approx(2501 / 2563, rel=0.01)
    first = top_channels([view, view], 2)[0]
    assert first.index == 5 and first.magnitude == pytest.approx(float(x[:, 5].abs().mean())) and first.energy == pytest.approx(2500, rel=0.05)


def test_relative_errors_are_those_of_the_outputs():
    generator = torch.Generator().manual_seed(0)
    x, weight = torch.randn(200, 24, dtype=torch.float64, generator=generator), torch.randn(10, 24, dtype=torch.float64, generator=generator)
    rounded = weight + 0.1 * torch.randn(10, 24, dtype=torch.float64, generator=generator)
    of_weight, of_output = relative_errors(weight, rounded, x.T @ x / len(x))
    assert of_weight == pytest.approx(float((rounded - weight).norm() / weight.norm()))
    assert of_output == pytest.approx(float((x @ (rounded - weight).T).norm() / (x @ weight.T).norm()))


def test_inputs_and_weights_that_are_zero_have_no_error():
    weight, moment = torch.randn(10, 24), torch.eye(24)
    assert relative_errors(weight, weight + 0.1, torch.zeros(24, 24))[1] == 0
    assert relative_errors(torch.zeros(10, 24), torch.zeros(10, 24), moment) == (0, 0)
    silent = outliers(View(*torch.zeros(3, 24)), 4)
    assert (silent.kurtosis, silent.max_over_median, silent.top_energy) == (0, 0, 0)


def small(name, **changes):
    recipe = load_recipe(name).replace(bits=3, group_size=16, embedding_bits="16", **changes)
    return recipe.replace(**{key: value for key, value in SALIENT.items() if getattr(recipe, key)})


@pytest.mark.parametrize("name", ["rtn", "mixed", "rosaq-paper", "rosaq-int3"])
def test_a_checkpoints_errors_are_those_of_its_layers(original, calibration, tmp_path, name):
    recipe = small(name)
    statistics = measure(original, calibration, "cpu")
    quantize(original, tmp_path / "out", recipe, statistics, "cpu")
    report = inspect(original, None, SETTINGS, tmp_path / "out", "cpu")
    assert report["calibration"] == statistics.record
    observed = observe(original, statistics, "cpu", no_progress)
    by_recipe = recipe_errors(original, recipe, statistics, observed, "cpu")
    assert len(by_recipe) == 14
    for error, found in zip(by_recipe, report["errors"], strict=True):
        assert (error.block, error.role) == (found["block"], found["role"])
        assert (error.weight, error.output) == (pytest.approx(found["weight"], rel=1e-6), pytest.approx(found["output"], rel=1e-6))
    # gate sees the same inputs in both models up to the basis, so feed the quantized layer with turned ones
    quantized, _ = load_model(str(tmp_path / "out"), "cpu")
    gain = original.block(1)["post_attention_layernorm.weight"].double()
    x = inputs_of(random_model("llama"), statistics.windows, "model.layers.1.mlp.gate_proj")
    rotated = x / gain @ turn(quantized, original) if recipe.rotation == "global" else x
    with torch.no_grad():
        found = quantized.model.layers[1].mlp.gate_proj(rotated.float()).double()
    exact = x @ original.block(1)["mlp.gate_proj.weight"].double().T
    error = next(error for error in report["errors"] if (error["block"], error["role"]) == (1, "gate"))
    assert error["output"] == pytest.approx(float((found - exact).norm() / exact.norm()), rel=3e-3)  # the tables that the turn is of are FP16


def test_activations_go_where_they_fit(original, calibration, monkeypatch):
    """Those of the passes for the moments and the gradients, which keep many, as in quantizing: none is on the host by default."""
    recipe, kept = small("rosaq-int3"), []

    class Spy(Activations):
        def __init__(self, shape, dtype, device, place, folder=None):
            kept.append((place, folder))
            super().__init__(shape, dtype, device, place, folder)

    def errors():
        statistics = measure(original, calibration, "cpu")
        return recipe_errors(original, recipe, statistics, list(observe(original, statistics, "cpu", no_progress)), "cpu")

    wanted = errors()
    assert recipe.token_weights == "gradient"
    monkeypatch.setattr("rosaq.run.place_activations", lambda work, *_: "disk" if work.activations > 3 * 32 * 48 * 4 * 2 else "host")
    monkeypatch.setattr("rosaq.sensitivity.Activations", Spy)
    assert errors() == wanted and kept == [("disk", None)] * held_states(2)


def test_one_pass_keeps_its_activations_where_they_fit(original, calibration, monkeypatch):
    """Those of `measure` and of `observe`: with too little memory on disk, and the same figures come out."""
    kept = []

    class Spy(Activations):
        def __init__(self, shape, dtype, device, place, folder=None):
            kept.append(place)
            super().__init__(shape, dtype, device, place, folder)

    def seen():
        statistics = measure(original, calibration, "cpu")
        return [site.moment for block in observe(original, statistics, "cpu", no_progress) for site in block.values()]

    monkeypatch.setattr("rosaq.moments.Activations", Spy)
    monkeypatch.setattr("rosaq.memory.available_bytes", lambda: 2**40)
    wanted = seen()
    monkeypatch.setattr("rosaq.memory.available_bytes", lambda: 2**20)
    assert all(torch.equal(one, other) for one, other in zip(seen(), wanted, strict=True))
    assert kept == ["host", "host", "disk", "disk"]


def test_a_target_without_an_allocation_has_no_errors(original, calibration):
    statistics = measure(original, calibration, "cpu")
    with pytest.raises(ValueError, match=r"'rosaq-int3' has target_bits 4.2 and no allocation"):
        recipe_errors(original, small("rosaq-int3", target_bits=4.2), statistics, [], "cpu")


def turn(quantized, original):
    """The rotation of the residual stream, from the two embedding tables."""
    return torch.linalg.lstsq(original.embedding().double(), quantized.model.embed_tokens.weight.double()).solution


def test_the_files(cli_files):
    report, folder = cli_files
    assert json.loads((folder / "inspection.json").read_text()) == report
    page = (folder / "inspection.html").read_text()
    assert not re.search(r"(src|href)=\"(?!data:)", page) and page.count("data:image/png;base64,") == 5
    for name in ("magnitudes", "spectra", "energy", "outliers", "errors"):
        assert (folder / f"{name}.png").read_bytes().startswith(b"\x89PNG") and "<svg" in (folder / f"{name}.svg").read_text()
    assert len(table8(report)) == 9 and all(row[3] in page for row in table8(report))
    spreads = [block[site]["norm_spread"] for block in report["blocks"] for site in ("attn_in", "mlp_in")]
    gain = random_model("llama").model.layers[1].post_attention_layernorm.weight.detach()
    assert spreads[3] == pytest.approx(float(gain.log().std()), rel=1e-5) and "norm_spread" not in report["blocks"][0]["mlp_out"]
    assert f"mlp_in {(spreads[1] + spreads[3]) / 2:.2f} (" in page


@pytest.fixture
def cli_files(original, calibration, tmp_path):
    quantize(original, tmp_path / "out", load_recipe("rosaq-paper").replace(**SIZES), calibration, "cpu")
    report = inspect(original, None, SETTINGS, tmp_path / "out", "cpu")
    write(report, tmp_path / "files")
    return report, tmp_path / "files"


def test_plots_have_the_data(cli_files):
    report, _ = cli_files
    figure = plots.magnitudes(report)
    before, after = figure.axes[0].get_lines()
    assert list(before.get_ydata()) == report["blocks"][0]["attn_in"]["magnitude"]["own"] and before.get_label() == "before"
    assert list(after.get_ydata()) == report["blocks"][0]["attn_in"]["magnitude"]["global"]
    assert [len(axis.get_lines()) for axis in plots.spectra(report).axes] == [2, 2, 2]
    shares = {line.get_label(): list(line.get_ydata()) for line in plots.energy(report).axes[0].get_lines()}
    assert shares["global"] == [block["attn_in"]["figures"]["global"]["top_energy"] for block in report["blocks"]]
    lines = plots.error_lines(report).axes[1].get_lines()
    assert list(lines[0].get_ydata()) == [error["output"] for error in report["errors"] if error["role"] == "q"] and len(lines) == 7


def test_what_is_refused(original, calibration, tmp_path, text_file):
    quantize(original, tmp_path / "out", load_recipe("rtn").replace(group_size=16), calibration, "cpu")
    with pytest.raises(ValueError, match="calibrated on windows with SHA-256"):
        inspect(original, Calibration(str(text_file), 2, 32), SETTINGS, tmp_path / "out", "cpu")
    with pytest.raises(ValueError, match="salient is 48, but there are 48 channels; allowed are 1 to 47"):
        inspect(original, calibration, Settings(48, 4), None, "cpu")
    with pytest.raises(ValueError, match="not a rosaq checkpoint that names its calibration text"):
        recorded_calibration(original_folder(original))
    other = tmp_path / "other"
    random_model("llama", seed=1).save_pretrained(other)
    tokenizer().save_pretrained(other)
    with pytest.raises(ValueError, match="is nothing like the original's"):
        inspect(str(other), None, SETTINGS, tmp_path / "out", "cpu")


def original_folder(source):
    from pathlib import Path

    return Path(source.name)
