"""Perplexity of a model rotated by one PCA and head-wise PCA, in FP16 weights, nothing quantized: it should not change.

Usage: python examples/rotated.py MODEL CALIBRATION_FILE DATA [--samples 128] [--seq-len 2048] [--limit WINDOWS]
"""

import argparse
import copy
import dataclasses
from pathlib import Path

import torch

import rosaq
from rosaq.basis import Bases, prepare_block, residual_basis
from rosaq.clock import no_progress
from rosaq.device import resolve_device
from rosaq.evaluation.perplexity import perplexity, read_wikitext2, text_windows
from rosaq.plan import make_plan
from rosaq.skeleton import full_model


def main() -> None:
    """Print the original's perplexity and the rotated model's."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("calibration")
    parser.add_argument("data", help="folder with wiki.test.raw")
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--seq-len", type=int, default=2048)
    parser.add_argument("--limit", type=int, help="windows, the first so many")
    arguments = parser.parse_args()
    device = resolve_device("auto")
    source = rosaq.open_source(arguments.model)
    windows = text_windows(read_wikitext2(Path(arguments.data)), source.tokenizer)[: arguments.limit]
    statistics = rosaq.measure(source, rosaq.Calibration(arguments.calibration, arguments.samples, arguments.seq_len), device)
    recipe = rosaq.load_recipe("rosaq-paper").replace(salient=1, salient_per_head=1, down_scaling="none")
    layouts = make_plan(recipe, source.architecture).blocks[0]
    basis = residual_basis(statistics.residual_moment().to(device), recipe)
    print(f"original {perplexity(full_model(source, torch.float32, device), windows, no_progress).perplexity:.4f}")

    config = copy.deepcopy(source.config)
    config.tie_word_embeddings = False
    model = full_model(dataclasses.replace(source, config=config), torch.float32, device)
    state = {
        "model.embed_tokens.weight": source.embedding().to(device) @ basis.float(),
        "lm_head.weight": (source.head() * source.final_norm()).to(device) @ basis.float(),
        "model.norm.weight": torch.ones(source.architecture.hidden, device=device),
    }
    for index, inputs in enumerate(statistics.inputs):
        block = {name: tensor.to(device, torch.float32) for name, tensor in source.block(index).items()}
        rotated = prepare_block(block, inputs, recipe, source.architecture, Bases(basis), layouts).block
        state.update({source.architecture.block_prefix(index) + name: tensor for name, tensor in rotated.items()})
    model.load_state_dict({name: tensor.half().float() for name, tensor in state.items()})
    print(f"rotated, FP16 weights {perplexity(model, windows, no_progress).perplexity:.4f}")


if __name__ == "__main__":
    main()
