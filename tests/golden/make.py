"""Makes the golden checkpoint: a tiny model from exact weights. Run only when the format version changes.

Usage: python tests/golden/make.py OUT. Every tensor kind of the format is in it: 3-bit codes, INT8 salient channels
per prefix and per head, an order, biases, 8-bit tables. No eigenvectors are, so that any machine gives the same bytes.
"""

import sys
import tempfile
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from rosaq import Recipe, measure, open_source, quantize

RECIPE = Recipe(
    name="golden", bits=3, group_size=16, rotation="none", head_rotation="none", salient=4, salient_per_head=2, salient_bits=8,
    selection="magnitude", down_scaling="none", embedding_bits="8",
)  # fmt: skip
IDS = torch.arange(24).remainder(20).view(2, 12)


def original() -> LlamaForCausalLM:
    """One block; every weight is a multiple of 1/64, the same on any machine."""
    config = LlamaConfig(
        vocab_size=20, hidden_size=24, intermediate_size=20, num_hidden_layers=1, num_attention_heads=3, num_key_value_heads=1, head_dim=8,
        max_position_embeddings=32, attention_bias=True, tie_word_embeddings=False,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for number, (name, parameter) in enumerate(sorted(model.named_parameters())):
            steps = (torch.arange(parameter.numel()) * (37 + 2 * number) + 11 * number) % 101 - 50
            parameter.copy_((1 + steps.float() / 256 if "norm" in name else steps.float() / 64).view_as(parameter))
    return model


def make(output: Path) -> None:
    """Quantize the tiny model into `output`."""
    with tempfile.TemporaryDirectory() as folder:
        original().save_pretrained(folder)
        source = open_source(folder)
        quantize(source, output, RECIPE, measure(source, IDS, "cpu"), "cpu")


if __name__ == "__main__":
    make(Path(sys.argv[1]))
