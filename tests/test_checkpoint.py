"""The checkpoint folder: its shards are what the safetensors library writes, and what was changed since is found."""

import hashlib
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save

from rosaq import Calibration, load_recipe, quantize
from rosaq.checkpoint import MANIFEST, verify
from rosaq.engines.loading import verify_checkpoint
from rosaq.shard_files import ShardFiles
from rosaq.workfolder import check_destination


@pytest.fixture
def checkpoint(saved, text_file, tmp_path):
    recipe = load_recipe("rosaq-paper").replace(group_size=16, salient=16, salient_per_head=4)
    quantize(str(saved("llama")), tmp_path / "out", recipe, Calibration(str(text_file), 2, 32), "cpu")
    return tmp_path / "out"


def left_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_whole_checkpoints_verify(checkpoint):
    assert verify_checkpoint(checkpoint)["files"].keys() == {"model.safetensors"}


def test_a_flipped_byte_is_found(checkpoint):
    file = checkpoint / "model.safetensors"
    data = bytearray(file.read_bytes())
    data[-10] ^= 1
    file.write_bytes(data)
    with pytest.raises(ValueError, match=rf"{file}: SHA-256 differs"):
        verify(checkpoint)


def test_truncation_is_found(checkpoint):
    file = checkpoint / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(ValueError, match=rf"{file}: \d+ bytes, but \d+ were written"):
        verify(checkpoint)


def test_a_shard_that_is_gone_or_outside_is_refused(checkpoint):
    manifest = json.loads((checkpoint / MANIFEST).read_text())
    manifest["files"] = {"../elsewhere.safetensors": {"sha256": "", "bytes": 0}}
    (checkpoint / MANIFEST).write_text(json.dumps(manifest))
    with pytest.raises(ValueError, match="not a plain file name"):
        verify(checkpoint)
    manifest["files"] = {"model-2.safetensors": {"sha256": "", "bytes": 0}}
    (checkpoint / MANIFEST).write_text(json.dumps(manifest))
    with pytest.raises(ValueError, match=r"model-2.safetensors: file is missing"):
        verify(checkpoint)


def test_another_format_version_is_refused(checkpoint):
    manifest = json.loads((checkpoint / MANIFEST).read_text())
    (checkpoint / MANIFEST).write_text(json.dumps({**manifest, "format_version": 2}))
    with pytest.raises(ValueError, match="checkpoint format 2; this rosaq reads format 1"):
        verify(checkpoint)


@pytest.mark.parametrize("files", [None, 3, {}, {"model.safetensors": 3}, {"model.safetensors": {"bytes": 3}}])
def test_a_manifest_that_names_no_files_is_refused(checkpoint, files):
    manifest = json.loads((checkpoint / MANIFEST).read_text())
    (checkpoint / MANIFEST).write_text(json.dumps({**manifest, "files": files}))
    with pytest.raises(ValueError, match=r"rosaq.json: names no files with their bytes and sha256"):
        verify_checkpoint(checkpoint)


def test_an_output_that_is_not_empty_is_refused_before_any_work(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "precious").write_text("mine")
    with pytest.raises(ValueError, match="output folder is not empty"):
        quantize("no/such-model", tmp_path / "out")
    assert left_in(tmp_path / "out") == ["precious"]
    with pytest.raises(ValueError, match="output is not a folder"):
        check_destination(tmp_path / "out" / "precious")


def test_an_output_that_nothing_can_be_renamed_to_is_refused(tmp_path, monkeypatch):
    (tmp_path / "folder").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "folder")
    with pytest.raises(ValueError, match=r"link: output is a symbolic link, not a folder; name the folder itself"):
        check_destination(tmp_path / "link")
    monkeypatch.setattr("os.path.ismount", lambda path: path == tmp_path / "folder")
    with pytest.raises(ValueError, match=r"folder: output is a mount point; name a folder inside it"):
        check_destination(tmp_path / "folder")


@pytest.mark.parametrize("shard_bytes", [40, 10**9])
def test_shards_are_what_the_library_would_write(tmp_path, monkeypatch, shard_bytes):
    monkeypatch.setattr("rosaq.shard_files.SHARD_BYTES", shard_bytes)
    types = {"b": torch.float16, "a.10": torch.int8, "a.2": torch.int32, "c": torch.bfloat16, "d": torch.float32, "e": torch.int8}
    tensors = {name: torch.arange(3 + 2 * i).view(1, -1).to(dtype) for i, (name, dtype) in enumerate(types.items())}
    shards = ShardFiles(tmp_path / "out", {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in tensors.items()})
    shards.create()
    for name in reversed(tensors):
        digest = shards.write({name: tensors[name]})
        assert digest == shards.digest([name]) == hashlib.sha256(tensors[name].view(torch.uint8).numpy().tobytes()).hexdigest()
    files = shards.finish()
    held = {file: [name for name, place in shards.places.items() if place.file.name == file] for file in files}
    assert (len(files) > 1) == (shard_bytes == 40) and {name for names in held.values() for name in names} == set(tensors)
    for file, names in held.items():
        wanted = save({name: tensors[name] for name in names}, {"format": "pt"})
        assert (tmp_path / "out" / file).read_bytes() == wanted
        assert files[file] == {"sha256": hashlib.sha256(wanted).hexdigest(), "bytes": len(wanted)}
