"""Random against learned rotations (QuaRot, SpinQuant) on one model: perplexities, losses on text kept aside, a plot.

Usage: python examples/learned.py MODEL CALIBRATION_FILE DATA OUT [--recipes quarot spinquant] [--bits 4 3] [--seed 0]
           [--group-size 64] [--samples 128] [--seq-len 2048] [--every 1] [--steps 100]

Recipes that learn the same rotation learn it once. OUT gets the checkpoints and loss-INT4.png, loss-INT3.png.
"""

import argparse
from pathlib import Path

import rosaq
from rosaq.clock import no_progress
from rosaq.curve import plot_learning
from rosaq.device import resolve_device
from rosaq.engines.loading import load_model
from rosaq.evaluation.perplexity import perplexity, read_wikitext2, text_windows


def main() -> None:
    """Quantize by each recipe and print a row for it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("calibration")
    parser.add_argument("data", type=Path, help="folder with wiki.test.raw")
    parser.add_argument("out", type=Path)
    parser.add_argument("--recipes", nargs="+", default=["quarot", "spinquant", "quarot-gptq", "spinquant-gptq", "quarot-r4", "spinquant-r4"])
    parser.add_argument("--bits", nargs="+", type=int, default=[4, 3])
    parser.add_argument("--seed", type=int, default=0, help="of the rotations")
    parser.add_argument("--group-size", type=int, default=64)
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--seq-len", type=int, default=2048)
    parser.add_argument("--window", type=int, default=2048, help="tokens of an evaluation window")
    parser.add_argument("--every", type=int, default=1, help="take one of so many evaluation windows")
    parser.add_argument("--steps", type=int, help="of learning, instead of the recipe's")
    arguments = parser.parse_args()
    device = resolve_device("auto")
    source = rosaq.open_source(arguments.model)
    windows = text_windows(read_wikitext2(arguments.data), source.tokenizer, arguments.window)[:: arguments.every]
    calibration = rosaq.Calibration(arguments.calibration, arguments.samples, arguments.seq_len)
    statistics = rosaq.measure(source, calibration, device)
    for bits in arguments.bits:
        learned = []
        for name in arguments.recipes:
            recipe = rosaq.load_recipe(name).replace(bits=bits, group_size=arguments.group_size, seed=arguments.seed)
            if recipe.rotation == "learned":
                recipe = recipe.replace(learning_steps=arguments.steps)
            folder = arguments.out / f"{name}-INT{bits}"
            report = rosaq.quantize(source, folder, recipe, statistics, device)
            model, _ = load_model(str(folder), device, "float32", weights="dense")
            result = perplexity(model, windows, no_progress)
            row = f"{name:16} INT{bits} {report.bits_per_weight:.3f} bits  perplexity {result.perplexity:.3f} +- {result.standard_error:.3f}"
            if report.learning:
                learned.append(folder)
                how = report.learning
                row += f"  kept aside {how['held_out_before']:.4f} -> {how['held_out_after']:.4f}, {report.seconds['learning']:.1f} s"
                row += f", |R'R - I| {how['orthogonality_error']:.1e}"
            print(row, flush=True)
            del model
        if learned:
            plot_learning(learned, arguments.out / f"loss-INT{bits}.png")


if __name__ == "__main__":
    main()
