"""The model card: the hub's metadata with the license carried over, a picture where one can be drawn, the same bytes always."""

import json
import sys

import pytest
import torch
from huggingface_hub import ModelCard

from rosaq import Calibration, load_recipe, open_source, quantize
from rosaq.card import CHANNELS, Pictures, metadata
from rosaq.channel_picture import channel_magnitudes, channel_picture
from rosaq.engines.export import export
from rosaq.provenance import Provenance, of_folder, of_gguf
from rosaq.rotation import principal_basis

SIZES = {"group_size": 16, "salient": 16, "salient_per_head": 4, "salient_down": 16}
HEAD = """---
license: other
license_name: some-license
license_link: LICENSE
language:
- en
- "no"
tags: [x]
---
# A model
"""


@pytest.fixture
def calibration(text_file):
    return Calibration(str(text_file), 2, 32)


def made(original, output, calibration, name="rosaq-int4"):
    recipe = load_recipe(name)
    return quantize(str(original), output, recipe.replace(**SIZES) if recipe.salient else recipe.replace(group_size=16), calibration, "cpu")


def test_the_card_of_a_local_model(saved, calibration, tmp_path):
    original = saved("llama")
    (original / "README.md").write_text(HEAD)
    report = made(original, tmp_path / "out", calibration)
    card = ModelCard.load(tmp_path / "out" / "README.md")
    assert card.data.to_dict() == {
        "language": ["en", "no"], "library_name": "transformers", "license": "other", "license_name": "some-license", "license_link": "LICENSE",
        "pipeline_tag": "text-generation", "tags": ["rosaq", "quantized", "4-bit"],
    }  # fmt: skip
    assert report.model == "llama-original" == json.loads((tmp_path / "out" / "rosaq.json").read_text())["report"]["model"]
    for words in ("# llama-original, quantized by rosaq", "License: some-license", f"{report.bits_per_weight:.2f} bits per weight", f"]({CHANNELS})"):
        assert words in card.text
    assert "tokens of `text.jsonl`" in card.text and str(tmp_path) not in card.content  # nothing of this machine


def test_the_card_of_a_model_of_the_hub(saved, monkeypatch):
    folder = saved("llama")
    (folder / "README.md").write_text("---\nlicense: apache-2.0\n---\n")
    monkeypatch.setattr("rosaq.source.snapshot_download", lambda *_, **__: str(folder))
    source = open_source("owner/model")
    assert source.public_name == "owner/model" and source.origin == Provenance("owner/model", "apache-2.0")
    found = metadata(source, {"bits": 3}).to_dict()
    assert found["base_model"] == "owner/model" and found["base_model_relation"] == "quantized" and found["tags"][-1] == "3-bit"


def test_what_a_gguf_file_states(smollm2):
    source = open_source(str(smollm2))
    assert source.origin == Provenance(None, "apache-2.0", languages=("en",)) and source.public_name == smollm2.name
    fields = {"general.license": "mit", "general.license.link": "https://x", "general.source.repo_url": "https://huggingface.co/owner/model"}
    assert of_gguf(fields) == Provenance("owner/model", "mit", None, "https://x")
    assert of_gguf({"general.source.repo_url": "https://example.com/a/b/c"}) == Provenance()


def test_a_model_that_states_nothing(saved, tmp_path):
    source = open_source(str(saved("llama")))
    assert source.origin == Provenance() and "license" not in metadata(source, {"bits": 4}).to_dict()
    (tmp_path / "README.md").write_text("# No metadata\n")
    assert of_folder(tmp_path, None) == Provenance()
    (tmp_path / "README.md").write_text("---\nlicense: [a, b\n---\n")
    with pytest.raises(ValueError, match=r"README.md: its metadata block cannot be read: .*; mend it or remove the file"):
        of_folder(tmp_path, None)
    (tmp_path / "README.md").write_text("---\nlicense: 3\nlanguage: en\n---\n")
    assert of_folder(tmp_path, None) == Provenance(languages=("en",))


def test_the_picture_is_of_the_rotation():
    x = torch.randn(500, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) * torch.linspace(0.1, 4, 12)
    moment = x.T @ x / len(x)
    basis, values = principal_basis(moment / moment.trace())
    before, after = channel_magnitudes(moment / moment.trace(), basis)
    torch.testing.assert_close(after.square(), values * 12, rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(before, x.square().mean(0).sqrt() / x.square().mean().sqrt(), rtol=1e-6, atol=1e-9)
    picture = channel_picture(moment, basis, 4)
    assert picture == channel_picture(moment, basis, 4) and picture.startswith(b"\x89PNG") and b"tIME" not in picture and b"Software" not in picture


def test_pictures_only_where_there_is_something_to_see(saved, calibration, tmp_path, monkeypatch):
    original = saved("llama")
    made(original, tmp_path / "rtn", calibration, "rtn")
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setattr("importlib.util.find_spec", lambda name, *_: None)
    made(original, tmp_path / "bare", calibration)
    for name in ("rtn", "bare"):
        assert not (tmp_path / name / CHANNELS).exists() and "png" not in (tmp_path / name / "README.md").read_text()


def test_other_writers_and_the_picture(saved, calibration, tmp_path):
    """An export has no card, and so no picture."""
    made(saved("llama"), tmp_path / "out", calibration)
    assert Pictures.of(tmp_path / "out").files == {CHANNELS: (tmp_path / "out" / CHANNELS).read_bytes()}
    export(tmp_path / "out", tmp_path / "dense")
    assert not (tmp_path / "dense" / CHANNELS).exists() and not (tmp_path / "dense" / "README.md").exists()
