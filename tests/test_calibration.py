"""Calibration windows, what is kept of the activations, and that it is what the model computes."""

import pytest
import torch

from conftest import random_model, tokenizer
from rosaq import Calibration, load_recipe, measure, open_source
from rosaq.architecture import LINEARS, SITES
from rosaq.basis import Bases, prepare_block, residual_basis
from rosaq.calibration import read_documents, token_windows, windows_hash
from rosaq.moments import collect_moments
from rosaq.plan import make_plan
from rosaq.skeleton import full_model


def test_windows_are_seeded_and_hashed(text_file):
    documents = read_documents(str(text_file))

    def windows(seed):
        return token_windows(documents, tokenizer(), Calibration(str(text_file), 4, 50, seed))

    assert windows(0).shape == (4, 50)
    assert torch.equal(windows(0), windows(0)) and not torch.equal(windows(0), windows(1))
    assert windows_hash(windows(0)) == windows_hash(windows(0)) != windows_hash(windows(1))


def test_text_formats(tmp_path):
    (tmp_path / "a.txt").write_text("one text")
    (tmp_path / "a.json").write_text('["one", {"text": "two"}]')
    (tmp_path / "a.jsonl").write_text('{"text": "one"}\n\n{"text": "two"}\n')
    assert read_documents(str(tmp_path / "a.txt")) == ["one text"]
    assert read_documents(str(tmp_path / "a.json")) == ["one", "two"]
    assert read_documents(str(tmp_path / "a.jsonl")) == ["one", "two"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", b"caf\xe9", "a.txt: not UTF-8 text"),
        ("a.jsonl", b'{"text": "caf\xe9"}', "a.jsonl: not UTF-8 text"),
        ("a.jsonl", b'{"text": "one"}\n{"text": 2}\n', "a.jsonl, line 2: no field 'text'"),
        ("a.json", b"[", "a.json: not valid JSON"),
        ("a.json", b'{"text": "one"}', "a.json: holds a JSON dict, not a list"),
        ("a.json", b'["one", {"body": "two"}]', "a.json, entry 2: no field 'text'"),
    ],
)
def test_what_is_no_text_is_refused_by_its_place(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        read_documents(str(tmp_path / name))


def test_inputs_are_the_models_own(family, saved):
    """Moments against hooks on the whole model; the residual sites divided by the norm's weight."""
    source = open_source(str(saved(family)))
    windows = torch.arange(160).remainder(90).view(5, 32)
    statistics = measure(source, windows, "cpu")
    model = full_model(source, torch.float32)
    seen = {}
    layer = model.model.layers[1]
    for name in ("self_attn.q_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.down_proj"):
        layer.get_submodule(name).register_forward_pre_hook(lambda _, x, name=name: seen.update({name: x[0].flatten(0, -2).double()}))
    with torch.inference_mode():
        model(windows)
    inputs = statistics.inputs[1]
    for site, name, norm in (
        ("attn_in", "self_attn.q_proj", layer.input_layernorm),
        ("mlp_in", "mlp.gate_proj", layer.post_attention_layernorm),
    ):
        x = seen[name] / norm.weight.detach().double()
        assert torch.allclose(inputs[site].moment.double(), x.T @ x / len(x), rtol=1e-3, atol=1e-4)
        assert torch.allclose(inputs[site].magnitude.double(), x.abs().mean(0), rtol=1e-3)
    heads = seen["self_attn.o_proj"].view(-1, 2, 2, 16).permute(1, 0, 2, 3).flatten(1, 2)  # two query heads a key-value head
    assert torch.allclose(inputs["attn_out"].moment.double(), heads.transpose(1, 2) @ heads / heads.shape[1], rtol=1e-3, atol=1e-5)
    assert torch.allclose(inputs["mlp_out"].magnitude.double(), seen["mlp.down_proj"].abs().mean(0), rtol=1e-3)
    sample = inputs["mlp_out"].sample
    assert sample.shape == (160, 80) and torch.allclose(sample.double(), seen["mlp.down_proj"], atol=1e-4)


def test_sliding_windows_are_the_models_own(tmp_path):
    """A window shorter than the text must reach the blocks' masks: they come from the model's own forward pass."""
    model = random_model("mistral", sliding_window=8)
    model.save_pretrained(tmp_path / "m")
    tokenizer().save_pretrained(tmp_path / "m")
    windows = torch.arange(64).view(2, 32)
    statistics = measure(open_source(str(tmp_path / "m")), windows, "cpu")
    seen = []
    model.model.layers[1].mlp.down_proj.register_forward_pre_hook(lambda _, x: seen.append(x[0].flatten(0, 1)))
    with torch.inference_mode():
        model(windows)
    assert torch.allclose(statistics.inputs[1]["mlp_out"].sample, seen[0], atol=1e-4)


def test_token_ids_outside_the_vocabulary_are_refused(saved):
    with pytest.raises(ValueError, match="calibration token 97 is not in the vocabulary of 97"):
        measure(open_source(str(saved("llama"))), torch.full((1, 8), 97), "cpu")


def test_whole_moments_turn_with_the_block(family, saved):
    """What GPTQ sees of each site is the second moment of what the prepared block's linear layers really get."""
    source = open_source(str(saved(family)))
    windows = torch.arange(160).remainder(90).view(5, 32)
    statistics = measure(source, windows, "cpu")
    moments = list(collect_moments(source, windows, "cpu", torch.float32))
    for name in ("rosaq-int4", "mixed", "rosaq-paper-per-layer"):
        recipe = load_recipe(name)
        recipe = recipe.replace(group_size=16, salient=16, salient_per_head=4, salient_down=16 if recipe.salient_down else 0)
        plan = make_plan(recipe, source.architecture)
        basis = residual_basis(statistics.residual_moment(), recipe) if recipe.rotation == "global" else None
        model = full_model(source, torch.float32)
        if basis is not None:
            model.model.embed_tokens.weight = torch.nn.Parameter(model.model.embed_tokens.weight @ basis.float())
        seen, prepared = {}, []
        for index, layer in enumerate(model.model.layers):
            prepared.append(prepare_block(source.block(index), statistics.inputs[index], recipe, source.architecture, Bases(basis), plan.blocks[0]))
            layer.load_state_dict(prepared[-1].block)
            for norm, rotation in prepared[-1].rotations.items():
                layer.get_submodule(norm).register_forward_hook(lambda _, x, y, rotation=rotation: y @ rotation.float())
        last = len(prepared) - 1
        for site, roles in SITES.items():
            linear = model.model.layers[last].get_submodule(LINEARS[roles[0]])
            linear.register_forward_pre_hook(lambda _, x, site=site, seen=seen: seen.update({site: x[0].flatten(0, -2).double()}))
        with torch.inference_mode():
            model.model(windows)
        for site, moment in moments[last].items():
            wanted = seen[site].T @ seen[site] / len(seen[site])
            error = (prepared[last].moment(site, moment).double() - wanted).norm() / wanted.norm()
            assert float(error) < 1e-3, (name, site)


def test_a_model_made_of_a_source_does_not_write_into_it(saved):
    source = open_source(str(saved("llama")))
    model = full_model(source, torch.float32)
    before = source.block(0)["mlp.up_proj.weight"].clone()
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight.zero_()
    assert torch.equal(source.block(0)["mlp.up_proj.weight"], before)
