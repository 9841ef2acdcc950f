"""Writing a checkpoint: nothing half-written is left, and what was written is found changed when it was changed."""

import json
import resource
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch

from rosaq import Calibration, load_recipe, quantize
from rosaq.checkpoint import MANIFEST, CheckpointWriter, verify
from rosaq.engines.loading import verify_checkpoint


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


def test_an_output_that_is_not_empty_is_refused_before_any_work(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "precious").write_text("mine")
    with pytest.raises(ValueError, match="output folder is not empty"):
        quantize("no/such-model", tmp_path / "out")
    assert left_in(tmp_path / "out") == ["precious"]
    with pytest.raises(ValueError, match="output is not a folder"):
        CheckpointWriter(tmp_path / "out" / "precious")


def test_a_failure_half_way_leaves_nothing(tmp_path):
    with pytest.raises(RuntimeError, match="half way"), CheckpointWriter(tmp_path / "deep" / "out") as writer:
        writer.add({"a": torch.zeros(10)})
        writer._write_shard()
        assert len(left_in(tmp_path / "deep")) == 1
        raise RuntimeError("half way")
    assert left_in(tmp_path / "deep") == []


@pytest.mark.parametrize("signal", ["SIGINT", "SIGTERM"])
def test_an_interrupted_command_leaves_nothing(saved, text_file, tmp_path, signal):
    """The command gets the signal while it rounds."""
    code = f"""
        import os, signal, sys
        import rosaq.pipeline as pipeline
        from rosaq_cli.app import main
        round_block = pipeline.quantize_block
        def interrupt(job, index, *rest):
            if index == 1:
                os.kill(os.getpid(), signal.{signal})
            return round_block(job, index, *rest)
        pipeline.quantize_block = interrupt
        sys.argv = ["rosaq", "quantize", {str(saved("llama"))!r}, "-o", {str(tmp_path / "made" / "out")!r}, "--calibration", {str(text_file)!r},
                    "--samples", "2", "--seq-len", "32", "--salient", "16", "--salient-per-head", "4", "--group-size", "16", "--device", "cpu"]
        main()
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, check=False)
    assert done.returncode == {"SIGINT": 130, "SIGTERM": 143}[signal], done.stderr
    assert "Traceback" not in done.stderr
    assert left_in(tmp_path / "made") == []


def test_a_full_disk_half_way_leaves_nothing(saved, text_file, tmp_path):
    """A limit on file size stands for the full disk: the write itself fails, in the writing library."""
    original = saved("llama", vocab_size=97, intermediate_size=800)

    def limit():
        resource.setrlimit(resource.RLIMIT_FSIZE, (40_000, 40_000))

    command = [sys.executable, "-m", "rosaq", "quantize", str(original), "-o", str(tmp_path / "made" / "out"), "--calibration", str(text_file)]
    options = ["--samples", "2", "--seq-len", "32", "--salient", "16", "--salient-per-head", "4", "--group-size", "16", "--device", "cpu"]
    done = subprocess.run([*command, *options], capture_output=True, text=True, preexec_fn=limit, check=False)
    assert done.returncode == 1, done.stderr
    assert "cannot be written" in done.stderr and str(tmp_path / "made" / "out") in done.stderr and "Traceback" not in done.stderr
    assert left_in(tmp_path / "made") == []


def test_a_destination_that_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="cannot be written"), CheckpointWriter(tmp_path / "file" / "out"):
        pass
