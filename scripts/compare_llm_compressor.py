"""Our RTN, GPTQ and AWQ beside llm-compressor's: same model, calibration tokens, grid and evaluation windows.

Usage: python scripts/compare_llm_compressor.py MODEL CALIBRATION_FILE DATA [--samples 32] [--seq-len 512] [--every 12]
       [--bits 4] [--only NAME ...]

It needs llm-compressor 0.14 in an environment of its own, with rosaq on PYTHONPATH:

    python -m venv DIR && DIR/bin/pip install torch==2.13.0
    DIR/bin/pip install transformers==5.17.0 "datasets<=5.0.1" accelerate==1.15.0 loguru nvidia-ml-py pillow pydantic gguf
    DIR/bin/pip install --no-deps llmcompressor==0.14.0 compressed-tensors==0.19.0 auto-round==0.15.1
    PYTHONPATH=src DIR/bin/python scripts/compare_llm_compressor.py ...

Each row is printed as it is done: perplexity in float32 over every twelfth window of WikiText-2.
"""

import argparse
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from datasets import Dataset
from llmcompressor import oneshot
from llmcompressor.modifiers.gptq import GPTQModifier
from llmcompressor.modifiers.quantization import QuantizationModifier
from llmcompressor.modifiers.transform.awq import AWQModifier
from loguru import logger
from transformers import AutoModelForCausalLM

import rosaq
from rosaq.clock import no_progress
from rosaq.engines.loading import load_model
from rosaq.evaluation.perplexity import perplexity, read_wikitext2, text_windows
from rosaq.skeleton import full_model
from rosaq.statistics import read_windows

GROUP = 64
Make = Callable[[], Any]


def theirs(dense: Path, windows: torch.Tensor, bits: int, kind: str, propagate: bool = False, **options: Any) -> Any:
    """The model as llm-compressor leaves it: weights on the grid, in float32.

    Args:
        dense: folder of the model in float32.
        windows: calibration token ids (S, T).
        bits: of a weight; asymmetric, per group of 64, as ours.
        kind: "rtn", "gptq" or "awq".
        propagate: whether a block is calibrated on the outputs of the quantized blocks before it (its default) or of
            the original ones (ours).
        options: of its modifier.
    """
    weights = QuantizationArgs(num_bits=bits, type="int", strategy="group", group_size=GROUP, symmetric=False)
    form = {"config_groups": {"group_0": QuantizationScheme(targets=["Linear"], weights=weights)}, "ignore": ["lm_head"]}
    recipe = {
        "rtn": lambda: [QuantizationModifier(**form)],
        "gptq": lambda: [GPTQModifier(**form, **options)],
        "awq": lambda: [AWQModifier(**options), QuantizationModifier(**form)],
    }[kind]()
    rows = Dataset.from_dict({"input_ids": windows.tolist(), "attention_mask": torch.ones_like(windows).tolist()})
    model = AutoModelForCausalLM.from_pretrained(dense, dtype=torch.float32)
    more = {} if kind == "rtn" else dict(dataset=rows, num_calibration_samples=len(rows), max_seq_length=windows.shape[1], pipeline="sequential")
    oneshot(model=model, recipe=recipe, propagate_error=propagate, shuffle_calibration_samples=False, **more)
    return model


def ours(source: rosaq.Source, statistics: rosaq.Statistics, name: str, **changes: Any) -> Any:
    """The packed checkpoint of a recipe, loaded in float32."""
    recipe = rosaq.load_recipe(name).replace(group_size=GROUP, **changes)
    with tempfile.TemporaryDirectory() as folder:
        rosaq.quantize(source, Path(folder) / "out", recipe, statistics, "cpu")
        return load_model(str(Path(folder) / "out"), "cpu", "float32")[0]


def main() -> None:
    """Print one row per method and implementation."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("calibration")
    parser.add_argument("data", help="folder with wiki.test.raw")
    parser.add_argument("--samples", type=int, default=32)
    parser.add_argument("--seq-len", type=int, default=512)
    parser.add_argument("--every", type=int, default=12, help="of the evaluation windows, each so-many-th")
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--only", nargs="*", help="rows, by the beginning of their names")
    arguments = parser.parse_args()
    source = rosaq.open_source(arguments.model)
    held_out = text_windows(read_wikitext2(Path(arguments.data)), source.tokenizer)[:: arguments.every]
    logger.remove()
    calibration = rosaq.Calibration(arguments.calibration, arguments.samples, arguments.seq_len)
    windows = read_windows(source, calibration, "cpu")
    statistics, bits = rosaq.measure(source, windows, "cpu"), arguments.bits
    dense = Path(tempfile.mkdtemp())
    for part in (full_model(source, torch.float32), source.tokenizer):
        part.save_pretrained(dense)
    rows: dict[str, Make] = {
        "original": lambda: full_model(source, torch.float32),
        "rtn, rosaq": lambda: ours(source, statistics, "rtn", bits=bits),
        "rtn, llm-compressor": lambda: theirs(dense, windows, bits, "rtn"),
        "gptq, rosaq": lambda: ours(source, statistics, "gptq", bits=bits),
        "gptq, llm-compressor": lambda: theirs(dense, windows, bits, "gptq", actorder=None),
        "gptq, llm-compressor, errors propagated": lambda: theirs(dense, windows, bits, "gptq", True, actorder=None),
        "gptq-act-order, rosaq": lambda: ours(source, statistics, "gptq-act-order", bits=bits),
        "gptq-act-order, llm-compressor": lambda: theirs(dense, windows, bits, "gptq", actorder="static"),
        "awq without clipping, rosaq": lambda: ours(source, statistics, "awq", bits=bits, clipping="none"),
        "awq, rosaq": lambda: ours(source, statistics, "awq", bits=bits),
        "awq, llm-compressor, activations only": lambda: theirs(dense, windows, bits, "awq", duo_scaling=False),
        "awq, llm-compressor": lambda: theirs(dense, windows, bits, "awq"),
    }
    for name, make in rows.items():
        if arguments.only and not any(name.startswith(beginning) for beginning in arguments.only):
            continue
        start = time.perf_counter()
        model = make()
        seconds = time.perf_counter() - start
        print(f"{name:42} perplexity {perplexity(model, held_out, no_progress).perplexity:.3f}, made in {seconds:.0f} s", flush=True)


if __name__ == "__main__":
    main()
