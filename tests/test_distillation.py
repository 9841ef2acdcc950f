"""Distillation: a smaller divergence at the same bytes of codes, a checkpoint that loads as it was trained."""

import json

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from rosaq import Calibration, Means, load_recipe, open_source, quantize
from rosaq.clock import no_progress
from rosaq.distillation import Settings, distill
from rosaq.distillation.trainable import PARTS, TrainableLinear, is_norm, make_trainable
from rosaq.distillation.training import HeadDivergence, _accumulate, _parameter_groups, head_weight, rate_factor, train
from rosaq.engines.loading import verify_checkpoint
from rosaq.evaluation.perplexity import divergence
from rosaq.skeleton import full_model
from rosaq.statistics import read_windows

IDS = torch.arange(3, 43).view(2, 20)
DEFAULT = Settings()
SMALL = dict(group_size=16, salient=16, salient_per_head=4, salient_down=16)


def test_the_divergence_is_kl(monkeypatch):
    """And its gradient autograd's, however many tokens are taken at a time."""
    torch.manual_seed(0)
    found, wanted, head, teacher_head = (torch.randn(*shape, dtype=torch.float64) for shape in ((5, 4), (5, 4), (7, 4), (7, 4)))
    copy = found.clone().requires_grad_()
    p, log_q = (wanted @ teacher_head.T).softmax(-1), (copy @ head.T).log_softmax(-1)
    kl = (p * (p.log() - log_q)).sum(-1).mean()
    (gradient,) = torch.autograd.grad(3 * kl, copy)
    for tokens in (1, 2, 5):
        monkeypatch.setattr("rosaq.distillation.training.CHUNK_BYTES", 4 * 7 * tokens)
        loss = HeadDivergence.apply(found.requires_grad_(), wanted, head, teacher_head)
        torch.testing.assert_close(loss, kl)
        torch.testing.assert_close(torch.autograd.grad(3 * loss, found)[0], gradient)


def test_the_rate_rises_and_falls():
    factors = [rate_factor(step, 200) for step in range(200)]
    assert max(range(200), key=factors.__getitem__) == 9 and factors[0] == pytest.approx(0.1) and factors[-1] < 1e-3
    assert rate_factor(0, 1) == 1.0


@pytest.fixture
def made(saved, text_file, tmp_path):
    """Quantize a tiny model: (family, recipe, **changes) -> (checkpoint, original)."""

    def make(family, recipe, **changes):
        original = saved(family)
        chosen = load_recipe(recipe)
        chosen = chosen.replace(**{**{key: value for key, value in SMALL.items() if key == "group_size" or getattr(chosen, key)}, **changes})
        quantize(str(original), tmp_path / "packed", chosen, Calibration(str(text_file), 4, 32), "cpu")
        return tmp_path / "packed", str(original)

    return make


CASES = {
    "heads, three bits": ("llama", "rosaq-int3", dict(rounding="nearest", refinement=0), 0.6),
    "bias, tied table that came apart, 8-bit tables": ("qwen2", "rosaq-nearest", dict(bits=3, embedding_bits="8"), 0.3),
    "ordered, tied table": ("llama-tied", "mixed", dict(bits=3), 0.2),
    "norms of heads, nothing salient": ("qwen3", "rtn", dict(bits=3), 0.1),
}
TOO_HIGH = (2e-2, 4e-3, 2e-2, 0)
TRAINED = (".scales", ".salient", "norm.weight")


@pytest.mark.parametrize("case", CASES)
def test_the_divergence_falls_and_the_codes_stay(case, made, text_file, tmp_path):
    """On windows held out, by the factor that the case names."""
    family, recipe, changes, factor = CASES[case]
    checkpoint, original = made(family, recipe, **changes)
    settings = Settings(epochs=4, learning_rates=(1e-2, 1e-3, 1e-2, 0))
    report = distill(checkpoint, original, tmp_path / "out", Calibration(str(text_file), 64, 48), settings, "cpu")
    assert len(report.losses) == 32
    assert report.after["kl_divergence"] < factor * report.before["kl_divergence"]

    verify_checkpoint(tmp_path / "out")
    before, after = load_file(checkpoint / "model.safetensors"), load_file(tmp_path / "out" / "model.safetensors")
    assert list(before) == list(after)
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed and all(name.endswith(TRAINED) and name.startswith(("model.layers.", "model.norm")) for name in changed)
    assert all(before[name].dtype == after[name].dtype for name in before)
    for part in TRAINED:
        assert any(name.endswith(part) for name in changed) == any(name.endswith(part) for name in before)


@pytest.mark.parametrize(("width", "rate"), [(64, 2e-3), (576, 2e-3), (2304, 5e-4)])
def test_a_wide_model_gets_a_lower_rate_of_its_salient_weights(width, rate):
    """As 1 / width from 576 on; the other parts' rates stay."""
    parameters = {part: [torch.nn.Parameter(torch.zeros(2))] for part in PARTS}
    groups = list(_parameter_groups(parameters, (1e-2, 2e-3, 3e-2, 0), width))
    assert [group["lr"] for group in groups] == pytest.approx([1e-2, rate, 3e-2])
    assert [group["params"] for group in groups] == [parameters[part] for part in ("scales", "salient", "norms")]


def test_codes_that_are_trained_are_stored(made, text_file, tmp_path):
    """With only them trained, only they change, and the divergence on windows held out falls."""
    checkpoint, original = made("llama", "rtn", bits=3)
    settings = Settings(epochs=4, learning_rates=(0, 0, 0, 2e-1))
    report = distill(checkpoint, original, tmp_path / "out", Calibration(str(text_file), 64, 48), settings, "cpu")
    assert report.after["kl_divergence"] < 0.6 * report.before["kl_divergence"]
    verify_checkpoint(tmp_path / "out")
    before, after = load_file(checkpoint / "model.safetensors"), load_file(tmp_path / "out" / "model.safetensors")
    assert {name.rpartition(".")[2] for name in before if not torch.equal(before[name], after[name])} == {"qweight"}


def weight(model, name):
    module = model.get_submodule(name)
    return (module.weight(torch.float32) if isinstance(module, TrainableLinear) else module.weight).detach()


def test_steps_that_were_too_long_are_shortened(made, text_file, tmp_path):
    """The first half of the way at which the divergence falls is kept, of every layer and norm."""
    checkpoint, original = made("llama", "rosaq-nearest", bits=3)
    settings = Settings(learning_rates=TOO_HIGH)
    report = distill(checkpoint, original, tmp_path / "out", Calibration(str(text_file), 64, 48), settings, "cpu")
    assert report.share < 1 and report.after["kl_divergence"] < report.before["kl_divergence"]
    verify_checkpoint(tmp_path / "out")
    record = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]["calibration"]["distillation"]
    assert record["share"] == report.share and f"{report.share:g} of the way there is kept" in (tmp_path / "out" / "README.md").read_text()

    begun, trained, kept = (AutoModelForCausalLM.from_pretrained(tmp_path / name, dtype=torch.float32) for name in ("packed", "packed", "out"))
    starts, ends, _ = (make_trainable(each, torch.float32) for each in (begun, trained, kept))
    windows = read_windows(open_source(original), Calibration(str(text_file), 72, 48), "cpu")[:64]
    train(trained, full_model(open_source(original), torch.float32), ends, windows, settings, 0, no_progress)
    names = [name for name, module in trained.named_modules() if isinstance(module, TrainableLinear) or is_norm(f"{name}.weight")]
    ended = {name: weight(trained, name).clone() for name in names}
    with torch.no_grad():
        for start, end in zip(*([value for part in PARTS for value in each[part]] for each in (starts, ends)), strict=True):
            end.copy_(start + report.share * (end - start))
    for name, end in ended.items():
        first, wanted, got = (weight(each, name) for each in (begun, trained, kept))
        assert float((got - wanted).norm()) <= 0.01 * float((end - first).norm()), name
        assert not torch.equal(got, first)


def test_it_loads_as_it_was_trained(made, text_file, tmp_path):
    """The divergence of the loaded checkpoint is the one reported, and its logits are the student's."""
    checkpoint, original = made("qwen2", "rosaq-nearest", bits=3, embedding_bits="8")
    text = Calibration(str(text_file), 8, 48)
    report = distill(checkpoint, original, tmp_path / "out", text, Settings(epochs=2, learning_rates=(1e-2, 1e-3, 1e-2, 0)), "cpu")
    loaded, student = (AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32) for _ in range(2))
    make_trainable(student, torch.float32)
    with torch.inference_mode():
        torch.testing.assert_close(student(IDS).logits, loaded(IDS).logits, rtol=1e-5, atol=1e-5)
    source = open_source(original)
    held_out = read_windows(source, Calibration(str(text_file), 16, 48), "cpu")[8:]
    again = divergence(loaded, full_model(source, torch.float32), held_out, no_progress)
    assert again.kl_divergence == pytest.approx(report.after["kl_divergence"], rel=1e-4)

    old, new = (json.loads((folder / "config.json").read_text()) for folder in (checkpoint, tmp_path / "out"))
    record = new["quantization_config"]["calibration"].pop("distillation")
    assert new == old
    assert record["held_out_kl_after"] == report.after["kl_divergence"] and record["settings"]["learning_rates"] == [1e-2, 1e-3, 1e-2, 0]
    manifest = json.loads((tmp_path / "out" / "rosaq.json").read_text())
    assert manifest["distillation"]["losses"] == report.losses and manifest["report"]
    assert "## Distilled" in (tmp_path / "out" / "README.md").read_text()
    assert (tmp_path / "out" / "channels.png").read_bytes() == (checkpoint / "channels.png").read_bytes()  # which the card shows
    with pytest.raises(ValueError, match="distilled already"):
        distill(tmp_path / "out", original, tmp_path / "twice", text, device="cpu")


DISTILLED = load_recipe("rosaq-distilled").replace(**SMALL, bits=3, distillation_windows=16, distillation_epochs=2)


def test_a_recipe_that_distils_is_both_commands(saved, text_file, tmp_path):
    """The same tensors as `quantize` and then `distill` give, whatever state an earlier run left."""
    original, text = str(saved("llama")), Calibration(str(text_file), 16, 48)
    quantize(original, tmp_path / "packed", DISTILLED.replace(distillation_windows=0, distillation_epochs=0), text, "cpu")
    distill(tmp_path / "packed", original, tmp_path / "two", text, Settings(epochs=2), "cpu")
    report = quantize(original, tmp_path / "one", DISTILLED, text, "cpu")
    assert report.seconds["distillation"] > 0 and not list(tmp_path.glob(".*"))
    assert (tmp_path / "one" / "model.safetensors").read_bytes() == (tmp_path / "two" / "model.safetensors").read_bytes()
    verify_checkpoint(tmp_path / "one")
    one, two = (json.loads((tmp_path / name / "rosaq.json").read_text()) for name in ("one", "two"))
    assert one["distillation"] == two["distillation"] and one["report"]["recipe"] == DISTILLED.to_dict()


@pytest.mark.parametrize("moment", ["before", "after", "named"])
def test_distilling_goes_on_where_it_was(moment, saved, text_file, tmp_path, monkeypatch):
    """Nothing is rounded again; what is distilled and has no name yet, or has just got it, is not distilled again."""
    import rosaq.workfolder
    from rosaq import pipeline
    from rosaq.workfolder import WorkFolder

    original, text = str(saved("llama")), Calibration(str(text_file), 16, 48)
    quantize(original, tmp_path / "whole", DISTILLED, text, "cpu")

    def fail(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(*{"before": (pipeline, "distill"), "after": (WorkFolder, "publish"), "named": (rosaq.workfolder, "_remove")}[moment], fail)
        quantize(original, tmp_path / "out", DISTILLED, text, "cpu")
    assert (tmp_path / "out").exists() == (moment == "named")
    if moment != "before":
        monkeypatch.setattr(pipeline, "distill", fail)
    report = quantize(original, tmp_path / "out", DISTILLED, text, "cpu")
    assert report.resumed_blocks == (2 if moment == "before" else 0) and not list(tmp_path.glob(".out*"))
    assert all((tmp_path / "out" / file.name).read_bytes() == file.read_bytes() for file in (tmp_path / "whole").iterdir())


def test_a_recipe_that_cannot_be_distilled_is_refused_at_once(saved, text_file, tmp_path):
    original, text = str(saved("llama")), Calibration(str(text_file), 4, 48)
    for match, recipe, calibration, means in (
        ("windows of 48 need", DISTILLED.replace(distillation_windows=400), text, None),
        ("distillation_windows is 4; it must be 8 or more", DISTILLED.replace(distillation_windows=4), text, None),
        ("give a text instead of token ids", DISTILLED, torch.arange(96).view(2, 48), None),
        ("distillation holds the whole model", DISTILLED, text, Means(max_memory=1 << 34)),
    ):
        with pytest.raises(ValueError, match=match):
            quantize(original, tmp_path / "out", recipe, calibration, "cpu", means=means)
        assert not list(tmp_path.glob("*out*"))


def test_blocks_are_run_again_in_the_backward_pass(made):
    """So that only their inputs are kept; lm_head, with its 8-bit table, runs once and takes no gradient of its own."""
    checkpoint, _ = made("llama", "rosaq-nearest", embedding_bits="8")
    student = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
    make_trainable(student, torch.float32)
    calls: dict[str, int] = {}
    for name, module in student.named_modules():
        if isinstance(module, TrainableLinear):
            module.register_forward_pre_hook(lambda *_, name=name: calls.update({name: calls.get(name, 0) + 1}))
    student(IDS, use_cache=False).logits.square().mean().backward()
    assert calls.pop("lm_head") == 1 and set(calls.values()) == {2} and len(calls) == 14
    missing = [name for name, parameter in student.named_parameters() if (parameter.grad is None) == parameter.requires_grad]
    assert missing == [] and student.lm_head.ratio.grad is None


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
def test_products_in_bfloat16(family, made):
    """As on a GPU: with and without autocast, which lowers attention only in training."""
    checkpoint, original = made(family, "rosaq-nearest", embedding_bits="8")
    student = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
    exact = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
    parameters = make_trainable(student, torch.bfloat16, codes=True)
    teacher = full_model(open_source(original), torch.bfloat16)
    with torch.inference_mode():
        wanted, got = exact(IDS).logits, student(IDS).logits
    assert got.dtype == torch.float32 and float((got - wanted).norm() / wanted.norm()) < 0.03
    with torch.autocast("cpu", torch.bfloat16):
        losses = [_accumulate(student, teacher, (head_weight(student), head_weight(teacher)), IDS)]
    assert 0 < losses[0] < 1
    assert all(float(each.grad.norm()) > 0 and each.grad.dtype == torch.float32 for part in parameters.values() for each in part)


def test_equal_seeds_give_equal_bytes(made, text_file, tmp_path):
    checkpoint, original = made("llama", "rosaq-nearest")
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        distill(checkpoint, original, tmp_path / name, Calibration(str(text_file), 8, 48, seed), Settings(epochs=1), "cpu")
    weights = [(tmp_path / name / "model.safetensors").read_bytes() for name in "abc"]
    assert weights[0] == weights[1] != weights[2]
    assert (tmp_path / "a" / "config.json").read_bytes() == (tmp_path / "b" / "config.json").read_bytes()


def test_a_rate_of_zero_leaves_a_part_alone(made, text_file, tmp_path):
    checkpoint, original = made("llama", "rosaq-nearest")
    settings = Settings(epochs=1, learning_rates=(0, 0, 1e-2, 0))
    distill(checkpoint, original, tmp_path / "out", Calibration(str(text_file), 8, 48), settings, "cpu")
    before, after = load_file(checkpoint / "model.safetensors"), load_file(tmp_path / "out" / "model.safetensors")
    assert {name.rpartition(".")[0][-4:] for name in before if not torch.equal(before[name], after[name])} <= {"norm"}


def test_refusals(made, saved, text_file, tmp_path):
    checkpoint, original = made("llama", "rosaq-nearest")
    text = Calibration(str(text_file), 8, 48)

    def refused(match, model=original, calibration=text, folder=checkpoint, settings=DEFAULT):
        with pytest.raises(ValueError, match=match):
            distill(folder, model, tmp_path / "out", calibration, settings, "cpu")
        assert not list(tmp_path.glob("*out*"))

    refused(r"not the original of .*packed: family is qwen2, the checkpoint's is llama", str(saved("qwen2")))
    refused("samples is 7; distillation takes 8 windows a step", calibration=Calibration(str(text_file), 7, 48))
    refused("300 windows of 48 need|308 windows of 48 need", calibration=Calibration(str(text_file), 300, 48))
    refused("seq-len is 129 tokens, but .* has a context of 128", calibration=Calibration(str(text_file), 8, 129))
    refused("not the folder of a rosaq checkpoint", folder=original)
    refused(
        "on held-out windows rose from .* at 0.125 of the way; lower the learning rates",
        settings=Settings(epochs=4, learning_rates=(0.99, 0.99, 0.99, 0)),
        calibration=Calibration(str(text_file), 64, 48),
    )
    with pytest.raises(ValueError, match="learning rates are"):
        Settings(learning_rates=(0, 0, 0, 0))
    with pytest.raises(ValueError, match="epochs is 0"):
        Settings(epochs=0)
    file = checkpoint / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1] + b"\x7f")
    refused("SHA-256 differs")


def test_a_vocabulary_of_another_size_is_refused(made, saved, text_file, tmp_path):
    checkpoint, _ = made("llama", "rosaq-nearest")
    with pytest.raises(ValueError, match="vocabulary is 101, the checkpoint's is 97"):
        distill(checkpoint, str(saved("llama", vocab_size=101)), tmp_path / "out", Calibration(str(text_file), 8, 48), device="cpu")


@pytest.mark.parametrize("recipe", ["rosaq-paper-per-layer", "rosaq-heads-concatenated", "quarot-r4"])
def test_rotations_at_run_time_are_refused(recipe, made, text_file, tmp_path):
    checkpoint, original = made("llama", recipe)
    with pytest.raises(ValueError, match="rotates at run time"):
        distill(checkpoint, original, tmp_path / "out", Calibration(str(text_file), 8, 48), device="cpu")
    assert not list(tmp_path.glob("*out*"))
