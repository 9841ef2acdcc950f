"""Quantize a model of the hub, check it and measure what it lost; stopped, the same command goes on where it was.

Usage: python examples/hub_7b.py [MODEL] [--out DIR] [--recipe rosaq-int4] [--bits 4] [--calibration pile] [--samples 128] [--max-memory 16GiB]

MODEL is a hub id (some ask for `hf auth login` first), a folder or a .gguf file. It prints the plan, asks nothing, and writes the checkpoint
and figures.json beside it: sizes, times, the error of every block, and perplexity and KL divergence on WikiText-2. Needs the extra "eval" for
texts of the hub. Measuring against the original loads that whole: leave it out with --no-evaluation where memory is short.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import rosaq
from rosaq.device import resolve_device
from rosaq.engines.loading import load_model, verify_checkpoint
from rosaq.evaluation.perplexity import divergence, read_text, read_wikitext2, text_windows
from rosaq.forecast import forecast
from rosaq.memory import parse_size
from rosaq.verification import part_errors
from rosaq_cli.plan import show_plan
from rosaq_cli.screen import silence_transformers, stage_bars


def options() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default="meta-llama/Llama-2-7b-hf")
    parser.add_argument("--out", type=Path, help="folder to make; default: the model's name and the recipe's")
    parser.add_argument("--recipe", default="rosaq-int4")
    parser.add_argument("--bits", type=int, help="2, 3 or 4 (default: the recipe's)")
    parser.add_argument("--group-size", type=int, help="channels that share a scale (default: the recipe's)")
    parser.add_argument("--salient", type=int, help="channels that stay precise (default: the recipe's)")
    parser.add_argument("--salient-per-head", type=int, help="the same of each head (default: the recipe's)")
    parser.add_argument("--calibration", default="pile", help="pile, c4, wikitext2, self or a text file")
    parser.add_argument("--samples", type=int, default=128, help="calibration windows")
    parser.add_argument("--seq-len", type=int, default=2048, help="tokens per window")
    parser.add_argument("--max-memory", type=parse_size, help="host memory to stay under, such as 16GiB")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    parser.add_argument("--text", type=Path, help="text file to measure on (default: WikiText-2 of the hub)")
    parser.add_argument("--window", type=int, default=2048, help="tokens per window of that text")
    parser.add_argument("--no-evaluation", action="store_true", help="do not load the original whole")
    return parser.parse_args()


def main() -> None:
    """Plan, quantize, check, measure."""
    given = options()
    silence_transformers()
    recipe = rosaq.load_recipe(given.recipe)
    recipe = recipe.replace(bits=given.bits, group_size=given.group_size, salient=given.salient, salient_per_head=given.salient_per_head)
    text, means = rosaq.Calibration(given.calibration, given.samples, given.seq_len), rosaq.Means(given.max_memory)
    out = given.out or Path(f"{Path(given.model).name}-{recipe.name}")
    plan = forecast(given.model, recipe, text, given.device, means, out)
    show_plan(plan)
    figures: dict[str, Any] = {"plan": plan.to_dict()}
    with stage_bars() as progress:
        figures["run"] = vars(rosaq.quantize(given.model, out, recipe, text, given.device, progress, means))
    verify_checkpoint(out)
    device = resolve_device(given.device)
    with stage_bars() as progress:
        figures["errors"] = [vars(part) for part in part_errors(out, rosaq.open_source(given.model), device, progress)]
    if not given.no_evaluation:
        packed, tokenizer = load_model(str(out), given.device)
        windows = text_windows(read_wikitext2() if given.text is None else read_text(given.text), tokenizer, given.window)
        with stage_bars() as progress:
            figures["text"] = divergence(packed, load_model(given.model, given.device)[0], windows, progress).to_dict()
        print(f"perplexity {figures['text']['model']['perplexity']:.3f}, original {figures['text']['reference']['perplexity']:.3f}")
        print(f"KL divergence {figures['text']['kl_divergence']:.4f} nats per token")
    beside = out.with_name(f"{out.name}.figures.json")
    beside.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")
    print(f"{out} and {beside}")


if __name__ == "__main__":
    main()
