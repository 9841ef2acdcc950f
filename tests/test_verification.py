"""A checkpoint against the original: small errors for its own, a refusal for another model's and for damaged parts."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from conftest import random_model
from rosaq import load_recipe, open_source, quantize
from rosaq.checkpoint import MANIFEST
from rosaq.engines.loading import verify_checkpoint
from rosaq.shard_files import sha256
from rosaq.verification import common_basis, part_errors

IDS = torch.arange(64).view(2, 32)


def quantized(source, folder, name="rosaq-paper", **changes):
    recipe = load_recipe(name).replace(group_size=16, **changes)
    quantize(source, folder, recipe.replace(salient=16, salient_per_head=4) if recipe.salient else recipe, IDS, "cpu")
    return folder


def change(folder, name, value):
    """Set one number of a stored tensor, and the recorded hash with it."""
    file = folder / "model.safetensors"
    tensors = {key: tensor.clone() for key, tensor in load_file(file).items()}
    tensors[name].view(-1)[0] = value
    save_file(tensors, file, metadata={"format": "pt"})
    manifest = json.loads((folder / MANIFEST).read_text())
    manifest["files"][file.name] = {"sha256": sha256(file), "bytes": file.stat().st_size}
    (folder / MANIFEST).write_text(json.dumps(manifest))


@pytest.mark.parametrize("family", ["llama-tied", "qwen2", "qwen3"])
@pytest.mark.parametrize("recipe", ["rosaq-paper", "rosaq-paper-per-layer", "mixed"])
def test_errors_are_those_of_rounding(family, recipe, saved, tmp_path):
    source = open_source(str(saved(family)))
    errors = part_errors(quantized(source, tmp_path / "out", recipe), source, "cpu")
    assert [error.part for error in errors][:3] == ["embedding", "block 0", "block 1"]
    assert errors[0].relative_error < 0.01 and all(0.003 < error.relative_error < 0.2 for error in errors[1:3])
    if recipe == "rosaq-paper":
        coarse = part_errors(quantized(source, tmp_path / "coarse", recipe, bits=3), source, "cpu")
        assert coarse[1].relative_error > 1.5 * errors[1].relative_error


def test_tables_of_8_bits(saved, tmp_path):
    source = open_source(str(saved("llama")))
    errors = part_errors(quantized(source, tmp_path / "out", embedding_bits="8"), source, "cpu")
    assert errors[-1].part == "lm_head" and 1e-3 < errors[0].relative_error < 0.01 and 1e-3 < errors[-1].relative_error < 0.01


@pytest.mark.parametrize("family", ["llama", "llama-tied"])
def test_a_vocabulary_smaller_than_the_width(family, saved, tmp_path):
    """Then the embedding tables do not say which basis all directions of the residual stream are in."""
    source = open_source(str(saved(family, vocab_size=20)))
    folder = tmp_path / "out"
    recipe = load_recipe("rosaq-paper").replace(group_size=16, salient=16, salient_per_head=4, embedding_bits="16")
    quantize(source, folder, recipe, IDS % 20, "cpu")
    errors = part_errors(folder, source, "cpu")
    assert [error.part for error in errors] == ["embedding", "block 0", "block 1", "lm_head"]
    assert errors[0].relative_error < 0.001 and all(0.003 < error.relative_error < 0.2 for error in errors[1:3])
    other = open_source(str(saved("qwen3", vocab_size=20, seed=1)))
    with pytest.raises(ValueError, match="model_type is"):
        part_errors(folder, other, "cpu")


def test_the_common_basis_of_weights_of_few_rows():
    generator = torch.Generator().manual_seed(0)
    basis = torch.linalg.qr(torch.randn(12, 12, dtype=torch.float64, generator=generator))[0]
    first, second, third = (torch.randn(rows, 12, dtype=torch.float64, generator=generator) for rows in (5, 4, 9))
    pairs = [(weight, weight @ basis) for weight in (first, second, third)]
    torch.testing.assert_close(common_basis(pairs), basis.float())
    open_left = common_basis(pairs[:2])
    torch.testing.assert_close(open_left.T @ open_left, torch.eye(12))
    torch.testing.assert_close(second.float() @ open_left, (second @ basis).float())
    # what comes first decides: a later pair is not even looked at where no direction is left
    torch.testing.assert_close(common_basis(iter([(torch.eye(12), basis.float()), (first.float(), first.float())])), basis.float())


def test_another_model_is_refused(saved, tmp_path):
    folder = quantized(open_source(str(saved("llama"))), tmp_path / "out")
    random_model("llama", seed=1).save_pretrained(tmp_path / "other")
    with pytest.raises(ValueError, match="is no quantized form of"):
        part_errors(folder, open_source(str(tmp_path / "other")), "cpu")
    with pytest.raises(ValueError, match=r"intermediate_size is 80, but .* has 96"):
        part_errors(folder, open_source(str(saved("llama-biased", intermediate_size=96))), "cpu")


def test_damage_that_hashes_do_not_show(saved, tmp_path):
    source = open_source(str(saved("llama")))
    folder = quantized(source, tmp_path / "out")
    verify_checkpoint(folder)
    change(folder, "model.layers.1.mlp.up_proj.scales", 1000.0)
    verify_checkpoint(folder)
    with pytest.raises(ValueError, match="block 1 is no quantized form"):
        part_errors(folder, source, "cpu")
    change(folder, "model.layers.1.mlp.up_proj.scales", float("nan"))
    with pytest.raises(ValueError, match=r"tensor 'model.layers.1.mlp.up_proj.scales' holds NaN or Inf"):
        verify_checkpoint(folder)
