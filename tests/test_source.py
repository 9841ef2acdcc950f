"""What is read of a model: by position, in any type, from one file or many; and nothing that could lead elsewhere."""

import json
import shutil
from functools import partial

import numpy
import pytest
import torch
from huggingface_hub import snapshot_download
from huggingface_hub.utils import filter_repo_objects
from safetensors.torch import load_file, save_file

from rosaq import Recipe, open_source, quantize
from rosaq.gguf_file import GgufTensors
from rosaq.safetensors_folder import SafetensorsFolder


def test_tensors_are_what_the_library_reads(tmp_path):
    types = (torch.float32, torch.float16, torch.bfloat16, torch.int8, torch.int64, torch.bool)
    tensors = {f"t{i}": torch.arange(7 + i).remainder(2).to(dtype).view(1, -1) for i, dtype in enumerate(types)}
    tensors |= {"scalar": torch.tensor(3.5), "empty": torch.empty(0, 4)}
    save_file(tensors, tmp_path / "model.safetensors")
    read = SafetensorsFolder(tmp_path)
    assert set(read) == set(tensors) and len(read) == len(tensors) and "t9" not in read
    for name, tensor in load_file(tmp_path / "model.safetensors").items():
        assert torch.equal(read[name], tensor) and read[name].dtype == tensor.dtype


def test_a_gguf_tensor_of_a_type_that_is_not_read_is_named(tmp_path):
    gguf = pytest.importorskip("gguf")
    file = tmp_path / "odd.gguf"
    writer = gguf.GGUFWriter(file, "llama")
    writer.add_tensor("output_norm.weight", numpy.ones(32, numpy.float32))
    writer.add_tensor("blk.0.ffn_norm.weight", numpy.ones(32, numpy.int8))
    for write in (writer.write_header_to_file, writer.write_kv_data_to_file, writer.write_tensors_to_file, writer.close):
        write()
    tensors = GgufTensors(file, 1, 1)
    assert torch.equal(tensors["model.norm.weight"], torch.ones(32))
    with pytest.raises(ValueError, match=r"odd.gguf: tensor 'blk.0.ffn_norm.weight' is of type I8, which the package gguf cannot read"):
        tensors["model.layers.0.post_attention_layernorm.weight"]


def test_shards_and_a_second_copy_of_the_weights(saved):
    one = saved("llama")
    whole = dict(open_source(str(one)).tensors)
    save_file({"consolidated": torch.zeros(1)}, one / "consolidated.safetensors")
    assert set(open_source(str(one)).tensors) == set(whole)
    names = sorted(whole)
    shards = {"a.safetensors": names[:9], "b.safetensors": names[9:]}
    for file, part in shards.items():
        save_file({name: whole[name] for name in part}, one / file)
    (one / "model.safetensors").unlink()
    index = {"weight_map": {name: file for file, part in shards.items() for name in part}}
    (one / "model.safetensors.index.json").write_text(json.dumps(index))
    read = open_source(str(one)).tensors
    assert set(read) == set(whole) and all(torch.equal(read[name], whole[name]) for name in names)
    shutil.copy(one / "a.safetensors", one / "c.safetensors")
    (one / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {**index["weight_map"], "x": "c.safetensors"}}))
    with pytest.raises(ValueError, match=r"c\.safetensors: tensor .* is in a\.safetensors too"):
        open_source(str(one))


@pytest.mark.parametrize("name", ["../elsewhere.safetensors", "/etc/passwd", "..", "sub/x.safetensors", 7, None, "a\0b"])
def test_an_index_that_leads_elsewhere(saved, name):
    folder = saved("llama")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"x": name}}))
    with pytest.raises(ValueError, match=r"is not a plain file name|file is missing"):
        open_source(str(folder))


@pytest.mark.parametrize("name", ["../../x", "model.layers.2.mlp.up_proj.weight", "model.layers.01.mlp.up_proj.weight", "model.layers.0.extra"])
def test_tensors_without_a_place(saved, name):
    from rosaq.plan import make_plan
    from rosaq.results import checkpoint_parts

    folder = saved("llama")
    save_file({**load_file(folder / "model.safetensors"), name: torch.ones(2)}, folder / "model.safetensors")
    source = open_source(str(folder))
    with pytest.raises(ValueError, match=r"has no place in a model of 2 blocks|is unknown in a llama block"):
        checkpoint_parts(source, make_plan(Recipe("x", salient=8, salient_per_head=2), source.architecture))


def test_pickled_weights_are_not_read(saved):
    folder = saved("llama")
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"pickled weights \(\.bin, \.pt\) are not read"):
        open_source(str(folder))


def test_code_that_comes_with_a_model_is_not_run(saved, tmp_path, monkeypatch):
    """Nor asked for: transformers would, of whoever or whatever is at the terminal."""
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    folder = saved("llama")
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "strange", "auto_map": {"AutoConfig": "strange.Config"}}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "strange.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    with pytest.raises(ValueError, match="transformers cannot read it"):
        open_source(str(folder))
    assert not (tmp_path / "ran").exists()


@pytest.fixture
def hub(saved, tmp_path, monkeypatch):
    """A hub as `snapshot_download` sees it: what a repository lists, and what of that is asked for, in the cache's own form."""
    files, asked = tmp_path / "hub", []
    saved("llama").rename(files)
    for name in (
        "pytorch_model.bin",
        "consolidated.safetensors",
        "original/consolidated.00.pth",
        "original/params.json",
        "model.onnx",
        "LICENSE.txt",
    ):
        (files / name).parent.mkdir(exist_ok=True)
        (files / name).write_text("{}")

    def download(repository, allow_patterns, ignore_patterns):
        folder = tmp_path / "cache" / repository.replace("/", "--")
        listed = [str(file.relative_to(files)) for file in files.rglob("*") if file.is_file()]
        for name in filter_repo_objects(listed, allow_patterns=allow_patterns, ignore_patterns=ignore_patterns):
            if not (folder / name).exists():
                asked.append(name)
                folder.mkdir(parents=True, exist_ok=True)
                (folder / name).symlink_to(files / name)
        return str(folder)

    monkeypatch.setattr("rosaq.source.snapshot_download", download)
    return asked


def test_a_hub_id_brings_each_weight_once(hub, tmp_path):
    """No pickle, no second copy of the weights, and nothing again for a second run."""
    ids = torch.arange(64).view(2, 32)
    recipe = Recipe("x", group_size=16, salient=16, salient_per_head=4)
    quantize("owner/tiny", tmp_path / "a", recipe, ids, "cpu")
    assert sorted(hub) == ["LICENSE.txt", "config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"]
    quantize("owner/tiny", tmp_path / "b", recipe, ids, "cpu")
    assert len(hub) == 6
    assert (tmp_path / "a" / "model.safetensors").read_bytes() == (tmp_path / "b" / "model.safetensors").read_bytes()


def test_a_cached_hub_id_needs_no_network(saved, tmp_path, monkeypatch):
    cache = tmp_path / "cache"
    repository = cache / "models--owner--tiny"
    for folder in ("refs", "snapshots"):
        (repository / folder).mkdir(parents=True)
    (repository / "refs" / "main").write_text("0" * 40)
    saved("llama").rename(repository / "snapshots" / ("0" * 40))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("rosaq.source.snapshot_download", partial(snapshot_download, cache_dir=cache))
    assert open_source("owner/tiny").architecture.layers == 2
    with pytest.raises(ValueError, match="owner/other: not a local path, and the hub did not give it"):
        open_source("owner/other")
