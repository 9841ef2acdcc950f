"""Allocation: the target is kept, the choice is that of the losses, and every loader takes what comes out."""

import itertools
import json

import pytest
import torch
from transformers import AutoModelForCausalLM

from rosaq import Calibration, allocation, load_recipe, measure, open_source, quantize
from rosaq.allocation import Option, choose, hull
from rosaq.architecture import LINEARS, SITES
from rosaq.clock import no_progress
from rosaq.distributed import Ranks
from rosaq.engines.loading import verify_checkpoint
from rosaq.job import make_job
from rosaq.kernels.reference import dequantize
from rosaq.layout import LinearLayout
from rosaq.linear import RosaqLinear
from rosaq.moments import Flow, collect_moments
from rosaq.plan import make_plan, site_options
from rosaq.recipe import Recipe, SiteForm
from rosaq.rounding.expected import expected_loss, split
from rosaq.rounding.linear import Rounding, quantize_linear
from rosaq.sensitivity import SEGMENT, token_weights
from rosaq.skeleton import full_model

SMALL = load_recipe("rosaq-int4").replace(group_size=32, salient=16, salient_per_head=8, salient_down=16)
IDS = torch.arange(3, 43).view(2, 20)


def fail(*_: object) -> None:
    """In place of a stage that is not reached, or must not run again."""
    raise RuntimeError("the power is gone")


def option(bits: int, loss: float) -> Option:
    return Option(SiteForm(4, bits, 64), bits, loss)


def test_the_hull_is_convex_and_falls():
    options = [option(bits, loss) for bits, loss in ((3, 9.0), (1, 10.0), (4, 2.0), (6, 2.5), (5, 1.9), (1, 11.0), (8, 0.0))]
    assert [found.bits for found in hull(options)] == [1, 4, 8]


def test_the_choice_is_nearly_the_best():
    generator = torch.Generator().manual_seed(0)
    for _ in range(20):
        sites = [
            [option(bits, float(loss)) for bits, loss in zip((4, 5, 7, 8), torch.rand(4, generator=generator).sort(descending=True)[0], strict=True)]
            for _ in range(4)
        ]
        chosen = choose(sites, 24)
        assert sum(found.bits for found in chosen) <= 24
        every = [each for each in itertools.product(*sites) if sum(found.bits for found in each) <= 24]
        best, worst = (pick(sum(found.loss for found in each) for each in every) for pick in (min, max))
        assert sum(found.loss for found in chosen) <= best + 0.2 * (worst - best)
    with pytest.raises(ValueError, match="take 16 bits, the target allows 15"):
        choose(sites, 15)


@pytest.mark.parametrize("clipping", ["none", "mse"])
@pytest.mark.parametrize("feedback", [False, True])
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_the_expected_loss_is_that_of_rounding(feedback, bits, clipping):
    """Within 30 %, with correlated inputs, heads and salient channels; feedback is counted."""
    torch.manual_seed(1)
    layout = LinearLayout(64, 96, bits, 32, blocks=3, salient=8, salient_bits=8)
    x = torch.randn(4000, 96) @ (torch.randn(96, 96) * torch.linspace(2, 0.1, 96))
    moment, weight = x.T @ x / len(x), torch.randn(64, 96)
    stored = quantize_linear(weight, layout, moment_KK=moment, rounding=Rounding(gptq=feedback, clipping=clipping))
    error = dequantize(layout, stored) - weight
    measured = float(((error @ moment) * error).sum())
    expected = expected_loss(split(weight, layout, moment, feedback), layout, clipping == "mse", feedback)
    assert expected == pytest.approx(measured, rel=0.3)


def test_token_weights_are_the_divergence_of_noise(saved):
    """Noise on a site's outputs, as large at each token as drawn for it, makes the divergence that the weights say."""
    source = open_source(str(saved("llama", num_hidden_layers=SEGMENT + 3)))
    windows = torch.randint(source.architecture.vocabulary, (64, 32), generator=torch.Generator().manual_seed(0))
    found = token_weights(source, windows, "cpu", torch.float32, Flow(), no_progress)
    assert [weights["mlp_in"].shape for weights in found] == [windows.shape] * (SEGMENT + 3)
    model = full_model(source, torch.float32)
    with torch.no_grad():
        wanted = model(windows).logits.double().log_softmax(-1)
        for index, site in ((0, "mlp_out"), (SEGMENT - 1, "attn_out"), (SEGMENT, "mlp_in"), (3, "attn_in")):
            generator = torch.Generator().manual_seed(2)
            size_ST1 = 0.02 * torch.rand(64, 32, 1, generator=generator)

            def noisy(_, __, y, size_ST1=size_ST1, generator=generator):
                return y + size_ST1 * torch.randn(y.shape, generator=generator)

            layers = [model.model.layers[index].get_submodule(LINEARS[role]) for role in SITES[site]]
            handles = [layer.register_forward_hook(noisy) for layer in layers]
            got = model(windows).logits.double().log_softmax(-1)
            for handle in handles:
                handle.remove()
            kl = float((wanted.exp() * (wanted - got)).sum(-1).mean())
            assert kl == pytest.approx(float((found[index][site] * size_ST1[..., 0].square()).mean()) / 2, rel=0.15), (index, site)


def test_a_loss_is_the_divergence(saved, text_file):
    """Of each site alone, within a factor of six, whatever its width: errors are alike at all tokens, so attention does not average v's out."""
    source = open_source(str(saved("llama", num_hidden_layers=2)))
    recipe = load_recipe("rtn").replace(group_size=32, bits=3, target_bits=4.2)
    statistics = measure(source, Calibration(str(text_file), 32, 32), "cpu")
    job, windows = make_job(source, recipe, statistics, "cpu"), statistics.windows
    weights = token_weights(source, windows, "cpu", torch.float32, Flow(), no_progress)
    model = full_model(source, torch.float32)
    ratios = []
    with torch.no_grad():
        wanted = model(windows).logits.double().log_softmax(-1)
        for index, moments in enumerate(collect_moments(source, windows, "cpu", torch.float32, Flow(weights=weights))):
            for site, options in zip(SITES, allocation._block_options(job, index, statistics, moments), strict=True):
                form = SiteForm(3, 0, 32)
                said = next(option.loss for option in options if option.form == form)
                layers = [model.model.layers[index].get_submodule(LINEARS[role]) for role in SITES[site]]
                kept = [layer.weight.clone() for layer in layers]
                for layer in layers:
                    layout = LinearLayout(*layer.weight.shape, form.bits, form.group_size)
                    layer.weight.copy_(dequantize(layout, quantize_linear(layer.weight, layout)))
                got = model(windows).logits.double().log_softmax(-1)
                for layer, weight in zip(layers, kept, strict=True):
                    layer.weight.copy_(weight)
                ratios.append(said / float((wanted.exp() * (wanted - got)).sum(-1).mean()))
    assert all(1 / 6 < ratio < 2 for ratio in ratios), ratios


def test_ranks_find_the_weights_of_their_windows(saved, monkeypatch):
    monkeypatch.setattr(Ranks, "add", lambda ranks, tensor: tensor)
    source = open_source(str(saved("llama")))
    windows = torch.randint(source.architecture.vocabulary, (160, 32), generator=torch.Generator().manual_seed(0))
    whole, *parts = (
        token_weights(source, windows, "cpu", torch.float32, Flow(ranks=ranks), no_progress) for ranks in (Ranks(), Ranks(0, 2), Ranks(1, 2))
    )
    for index, weights in enumerate(whole):
        for site in SITES:
            assert torch.equal(parts[0][index][site] + parts[1][index][site], weights[site])


def test_tokens_count_by_their_weights(saved):
    """A weight of 2 is the token twice, one of 0 not at all."""
    source = open_source(str(saved("llama")))
    windows = torch.randint(source.architecture.vocabulary, (4, 32), generator=torch.Generator().manual_seed(0))
    layers = source.architecture.layers
    counts = [{site: torch.tensor([0.0, 2.0, 1.0, 1.0])[:, None].expand(4, 32) for site in SITES} for _ in range(layers)]
    weighted = list(collect_moments(source, windows, "cpu", torch.float32, Flow(weights=counts)))
    again = list(collect_moments(source, windows[[1, 1, 2, 3]], "cpu", torch.float32, Flow()))
    for ours, wanted in zip(weighted, again, strict=True):
        assert all(torch.allclose(ours[site], wanted[site], rtol=1e-4, atol=1e-6) for site in SITES)


def test_gradient_weights_make_other_codes_and_go_on_where_they_were(saved, text_file, tmp_path, monkeypatch):
    source, text = str(saved("llama")), Calibration(str(text_file), 8, 32)
    recipe = SMALL.replace(token_weights="gradient", bits=3)
    quantize(source, tmp_path / "equal", recipe.replace(token_weights="equal"), text, "cpu")
    quantize(source, tmp_path / "whole", recipe, text, "cpu")
    read = lambda name: (tmp_path / name / "model.safetensors").read_bytes()  # noqa: E731
    assert read("equal") != read("whole")

    with monkeypatch.context() as patch:
        patch.setattr("rosaq.pipeline.quantize_table", fail)
        with pytest.raises(RuntimeError, match="power"):
            quantize(source, tmp_path / "broken", recipe, text, "cpu")
    with monkeypatch.context() as patch:
        patch.setattr("rosaq.run.token_weights", fail)  # they are kept, not found again
        quantize(source, tmp_path / "broken", recipe, text, "cpu")
    assert read("broken") == read("whole")


@pytest.mark.parametrize(("family", "recipe", "target"), [("llama", SMALL, 4.0), ("qwen2", SMALL, 4.9), ("qwen3", load_recipe("rtn"), 4.2)])
def test_the_target_is_kept(family, recipe, target, saved, text_file, tmp_path):
    """By the count of the tables; the forms are in the checkpoint, which is verified, and runs."""
    recipe = recipe.replace(target_bits=target)
    source = open_source(str(saved(family)))
    report = quantize(source, tmp_path / "out", recipe, Calibration(str(text_file), 8, 32), "cpu")
    assert target - 0.25 < report.bits_per_weight <= target
    stored = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]["recipe"]
    assert stored == report.recipe and len(stored["allocation"].split()) == source.architecture.layers
    again = make_plan(Recipe.from_dict(stored), source.architecture, source.biases())
    assert again.bits_per_weight == report.bits_per_weight
    options = site_options(recipe)
    for word in stored["allocation"].split():
        for entry, forms in zip(word.split(","), options.values(), strict=True):
            assert entry in map(str, forms)
    verify_checkpoint(tmp_path / "out")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    for index, block in enumerate(loaded.model.layers):
        layouts = {name: layer.layout for name, layer in block.named_modules() if isinstance(layer, RosaqLinear)}
        assert layouts["self_attn.q_proj"].form() == layouts["self_attn.v_proj"].form() == again.blocks[index]["k"].form()
        assert layouts["mlp.gate_proj"].form() == layouts["mlp.up_proj"].form()
    original = full_model(source, torch.float32)
    with torch.inference_mode():
        wanted, got = original(IDS).logits, loaded(IDS).logits
    assert float((got - wanted).norm() / wanted.norm()) < 0.5


def test_a_run_that_ended_goes_on_with_the_same_allocation(saved, text_file, tmp_path, monkeypatch):
    """And ends in the bytes of one that did not."""
    source, text = str(saved("llama")), Calibration(str(text_file), 8, 32)
    recipe = SMALL.replace(target_bits=4.2)
    quantize(source, tmp_path / "whole", recipe, text, "cpu")

    with monkeypatch.context() as patch:
        patch.setattr("rosaq.pipeline.quantize_table", fail)
        with pytest.raises(RuntimeError, match="power"):
            quantize(source, tmp_path / "broken", recipe, text, "cpu")
    with monkeypatch.context() as patch:
        patch.setattr("rosaq.pipeline.allocate", fail)  # it is kept, not found again
        report = quantize(source, tmp_path / "broken", recipe, text, "cpu")
    assert report.resumed_blocks == 2
    for name in ("model.safetensors", "config.json", "rosaq.json"):
        assert (tmp_path / "broken" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    with pytest.raises(ValueError, match="not empty"):
        quantize(source, tmp_path / "whole", recipe, text, "cpu")


def test_refusals(saved, text_file, tmp_path):
    source = open_source(str(saved("llama")))
    for target in (1.0, 2.0, 9.0):
        with pytest.raises(ValueError, match=rf"target_bits is {target:g}; .* this model can have 2\.\d+ to \d\.\d+ bits per weight"):
            quantize(source, tmp_path / "out", SMALL.replace(target_bits=target), Calibration(str(text_file), 8, 32), "cpu")
    assert not list(tmp_path.glob("*out*"))
    for name, match in (("spinquant", "rotation 'learned'"), ("rosaq-bottom", "selection"), ("rosaq-heads-concatenated", "'concatenated'")):
        with pytest.raises(ValueError, match=match):
            load_recipe(name).replace(target_bits=4.0)
    with pytest.raises(ValueError, match="words of four BITS:SALIENT:GROUP"):
        SMALL.replace(allocation="4:16:32,4:8:32,4:16:32")
    with pytest.raises(ValueError, match="allocation is of 1 decoder blocks, but the model has 2"):
        make_plan(SMALL.replace(allocation="4:16:32,4:8:32,4:16:32,3:0:32"), source.architecture)
