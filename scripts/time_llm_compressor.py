"""llm-compressor's GPTQ timed on random decoder blocks of a model's shape, beside `rosaq benchmark quantize`.

Usage: python scripts/time_llm_compressor.py [SHAPE] [--blocks 1 2] [--samples 128] [--seq-len 2048] [--device cuda:0]

It needs llm-compressor, as `compare_llm_compressor.py` says. A model of so many blocks, with its tables, is made in memory
and quantized in memory (W4A16_ASYM, groups of 128) with its sequential pipeline, from random tokens: reading and writing
files is not counted. The time of all blocks is extrapolated from the first number of blocks, and from the difference
between the last and the first.
"""

import argparse
import tempfile
import time
from typing import Any

import torch
from datasets import Dataset
from llmcompressor import oneshot
from llmcompressor.modifiers.gptq import GPTQModifier
from llmcompressor.pipelines.cache import IntermediatesCache
from loguru import logger
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from rosaq.benchmark.model_shapes import named_config


def seconds(shape: str, blocks: int, tokens: tuple[int, int], device: str) -> float:
    """Time of GPTQ on so many blocks of a shape."""
    config = named_config(shape, blocks)
    torch.manual_seed(0)
    with torch.device(device):
        made = AutoModelForCausalLM.from_config(config, dtype=config.dtype)
    with tempfile.TemporaryDirectory() as folder:  # llm-compressor looks up where a model came from
        made.cpu().save_pretrained(folder)
        words = Tokenizer(WordLevel({"<unk>": 0}, unk_token="<unk>"))  # never used; llm-compressor looks for one
        PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>").save_pretrained(folder)
        return _quantized(AutoModelForCausalLM.from_pretrained(folder, dtype=config.dtype), tokens)


def _quantized(model: Any, tokens: tuple[int, int]) -> float:
    ids = torch.randint(model.config.vocab_size, tokens)
    rows = Dataset.from_dict({"input_ids": ids.tolist(), "attention_mask": torch.ones_like(ids).tolist()})
    start = time.perf_counter()
    oneshot(
        model=model,
        dataset=rows,
        recipe=[GPTQModifier(targets="Linear", scheme="W4A16_ASYM", ignore=["lm_head"])],
        num_calibration_samples=tokens[0],
        max_seq_length=tokens[1],
        pipeline="sequential",
        shuffle_calibration_samples=False,
    )
    return time.perf_counter() - start


def main() -> None:
    """Print the time of each number of blocks, and of all."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shape", nargs="?", default="llama-2-7b")
    parser.add_argument("--blocks", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--seq-len", type=int, default=2048)
    parser.add_argument("--device", default="cuda:0", help="where random weights are drawn; llm-compressor computes on the first GPU")
    arguments = parser.parse_args()
    logger.remove()
    if not torch.cuda.is_available():  # it pins memory, which PyTorch refuses without an accelerator
        IntermediatesCache.pin_memory = lambda *_, **__: None
    whole, times = named_config(arguments.shape).num_hidden_layers, []
    for blocks in arguments.blocks:
        times.append(seconds(arguments.shape, blocks, (arguments.samples, arguments.seq_len), arguments.device))
        peak = torch.cuda.max_memory_allocated() / 2**30 if torch.cuda.is_available() else 0
        print(f"llm-compressor GPTQ, {arguments.shape}, {blocks} blocks: {times[-1]:.1f} s, peak device memory {peak:.1f} GiB", flush=True)
    first, last = arguments.blocks[0], arguments.blocks[-1]
    print(f"one of these times {whole} / {first}: {times[0] * whole / first:.0f} s", flush=True)
    if last > first:
        block = (times[-1] - times[0]) / (last - first)
        print(f"by the difference: {block:.1f} s a block, {times[0] + block * (whole - first):.0f} s for {whole}", flush=True)


if __name__ == "__main__":
    main()
