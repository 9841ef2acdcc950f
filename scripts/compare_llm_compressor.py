"""Our RTN, GPTQ and AWQ beside llm-compressor's, and auto-round's: same model, calibration tokens, grid and evaluation windows.

Usage: python scripts/compare_llm_compressor.py MODEL CALIBRATION_FILE DATA [--samples 32] [--seq-len 512] [--every 12]
       [--bits 4 3] [--only NAME ...] [--device cuda] [--steps 200] [--seed 0]

It needs llm-compressor 0.14 in an environment of its own, with rosaq on PYTHONPATH:

    python -m venv DIR && DIR/bin/pip install torch==2.13.0
    DIR/bin/pip install transformers==5.17.0 "datasets<=5.0.1" accelerate==1.15.0 loguru nvidia-ml-py pillow pydantic py-cpuinfo gguf
    DIR/bin/pip install --no-deps llmcompressor==0.14.0 compressed-tensors==0.19.0 auto-round==0.15.1
    PYTHONPATH=src DIR/bin/python scripts/compare_llm_compressor.py ...

First, in seconds, GPTQ's codes for one layer of random weights with correlated inputs, and every row on a small random
Llama; then, row after row, perplexity in float32 over every twelfth window of WikiText-2. `--only` leaves out the first two.
All rows but AWQ's clipped ones and auto-round's have min-max grids; every row spends the same bits per weight.
"""

import argparse
import tempfile
import time
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import torch
from auto_round import AutoRound
from compressed_tensors.offload import remove_dispatch
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from datasets import Dataset
from llmcompressor import oneshot
from llmcompressor.modifiers.gptq import GPTQModifier
from llmcompressor.modifiers.gptq.gptq_quantize import quantize_weight
from llmcompressor.modifiers.quantization import QuantizationModifier
from llmcompressor.modifiers.transform.awq import AWQModifier
from llmcompressor.pipelines.cache import IntermediatesCache
from loguru import logger
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

import rosaq
from rosaq.clock import no_progress
from rosaq.engines.loading import load_model
from rosaq.evaluation.perplexity import perplexity, read_wikitext2, text_windows
from rosaq.kernels.reference import dequantize
from rosaq.layout import LinearLayout
from rosaq.rounding.gptq import gptq
from rosaq.rounding.grid import fit_grid, grouped, ungrouped
from rosaq.rounding.linear import quantize_linear
from rosaq.rounding.scaling import moment_loss
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
    text = dict(dataset=rows, num_calibration_samples=len(rows), max_seq_length=windows.shape[1], batch_size=8, shuffle_calibration_samples=False)
    place = "cuda" if torch.cuda.is_available() else "cpu"
    more = {} if kind == "rtn" else dict(text, pipeline="sequential", propagate_error=propagate, sequential_offload_device=place)
    oneshot(model=model, recipe=recipe, **more)
    return remove_dispatch(model)


def auto_round(dense: Path, source: rosaq.Source, windows: torch.Tensor, bits: int, steps: int) -> Any:
    """The model as auto-round (SignRound, arXiv:2309.05516) leaves it by its defaults: rounding and ranges learned block by block."""
    model = AutoModelForCausalLM.from_pretrained(dense, dtype=torch.float32)
    form = {"bits": bits, "group_size": GROUP, "sym": False, "data_type": "int"}
    rounder = AutoRound(
        model, source.tokenizer, scheme=form, iters=steps, dataset=list(windows.split(8)), nsamples=len(windows), seqlen=windows.shape[1],
        device_map="cuda" if torch.cuda.is_available() else "cpu", enable_torch_compile=False,
    )  # fmt: skip
    return rounder.quantize()[0].float()


def ours(source: rosaq.Source, statistics: rosaq.Statistics, device: str, name: str, **changes: Any) -> Any:
    """The packed checkpoint of a recipe, loaded in float32."""
    recipe = rosaq.load_recipe(name).replace(group_size=GROUP, **changes)
    with tempfile.TemporaryDirectory() as folder:
        rosaq.quantize(source, Path(folder) / "out", recipe, statistics, device)
        return load_model(str(Path(folder) / "out"), device, "float32", weights="dense")[0]


def compare_codes() -> None:
    """Both GPTQs on the same weight, moment and grid: loss tr(E M E^T) of each, and the share of equal weights."""
    generator = torch.Generator().manual_seed(0)
    shared = torch.randn(4000, 72, generator=generator) @ torch.randn(72, 576, generator=generator)
    x, weight = shared + 0.3 * torch.randn(4000, 576, generator=generator), torch.randn(192, 576, generator=generator)
    moment, layout = x.T @ x / len(x), LinearLayout(192, 576, 4, GROUP)
    scale, zero = fit_grid(grouped(weight, layout), 4)
    loss = moment_loss(moment)
    print(f"one layer, rounded to nearest: loss {loss(dequantize(layout, quantize_linear(weight, layout)) - weight):.0f}")

    def fitted(part: torch.Tensor, group: int, counts: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return fit_grid(part, 4)

    def fixed(part: torch.Tensor, group: int, counts: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return scale[:, group : group + 1], zero[:, group : group + 1]

    for name, fit, act_order in (("grids as groups come", fitted, False), ("grids fixed before", fixed, False), ("act-order", fitted, True)):
        codes, scales, zeros, _ = gptq(weight, moment, layout, fit, act_order)
        mine = ungrouped((grouped(codes, layout) - zeros[..., None]) * scales[..., None], layout)
        form = QuantizationArgs(num_bits=4, type="int", strategy="group", group_size=GROUP, symmetric=False, actorder="static" if act_order else None)
        other = quantize_weight(weight[None].clone(), moment[None].clone(), scale[None], zero[None] - 8, None, form)[0][0]  # its codes are -8 to 7
        equal = float(((mine - other).abs() < 1e-4).float().mean())
        print(f"one layer, {name}: loss {loss(mine - weight):.0f}, llm-compressor {loss(other - weight):.0f}, equal weights {equal:.2%}", flush=True)


def save_dense(source: rosaq.Source) -> Path:
    """A folder with the model in float32, which the others read."""
    folder = Path(tempfile.mkdtemp())
    for part in (full_model(source, torch.float32), source.tokenizer):
        part.save_pretrained(folder)
    return folder


def all_rows(source: rosaq.Source, dense: Path, windows: torch.Tensor, bits: int, device: str, steps: int) -> dict[str, Make]:
    """What makes each row's model, by its name."""
    statistics = cache(lambda: rosaq.measure(source, windows, device))  # for our rows only
    return {
        "original": lambda: full_model(source, torch.float32),
        "rtn, rosaq": lambda: ours(source, statistics(), device, "rtn", bits=bits),
        "rtn, llm-compressor": lambda: theirs(dense, windows, bits, "rtn"),
        "gptq, rosaq": lambda: ours(source, statistics(), device, "gptq", bits=bits),
        "gptq, llm-compressor": lambda: theirs(dense, windows, bits, "gptq", actorder=None),
        "gptq, llm-compressor, errors propagated": lambda: theirs(dense, windows, bits, "gptq", True, actorder=None),
        "gptq-act-order, rosaq": lambda: ours(source, statistics(), device, "gptq-act-order", bits=bits),
        "gptq-act-order, llm-compressor": lambda: theirs(dense, windows, bits, "gptq", actorder="static"),
        "awq without clipping, rosaq": lambda: ours(source, statistics(), device, "awq", bits=bits, clipping="none"),
        "awq, rosaq": lambda: ours(source, statistics(), device, "awq", bits=bits),
        "awq, llm-compressor": lambda: theirs(dense, windows, bits, "awq"),
        "awq, llm-compressor, activations only": lambda: theirs(dense, windows, bits, "awq", duo_scaling=False),
        "auto-round": lambda: auto_round(dense, source, windows, bits, steps),
    }


@torch.inference_mode()
def compare_small(bits: int, steps: int) -> None:
    """Every row on a small random Llama whose norms have a few channels twenty times as large: error of its logits."""
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=256, intermediate_size=512, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=4, vocab_size=512,
        tie_word_embeddings=False, architectures=["LlamaForCausalLM"],
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    for name, parameter in model.named_parameters():
        parameter.copy_(torch.randn_like(parameter) * 0.3 + 1 if "norm" in name else torch.randn_like(parameter) / parameter.shape[-1] ** 0.5)
        if name.endswith(("input_layernorm.weight", "post_attention_layernorm.weight")):
            parameter[::64] *= 20
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        words = Tokenizer(WordLevel({"<unk>": 0}, unk_token="<unk>"))  # never used; llm-compressor looks for one
        PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>").save_pretrained(folder)
        windows, held_out = torch.randint(512, (24, 64)).split([16, 8])
        wanted = model(held_out).logits
        source = rosaq.open_source(folder)
        for name, make in all_rows(source, save_dense(source), windows, bits, "cpu", steps).items():
            error = (make()(held_out).logits - wanted).norm() / wanted.norm()
            print(f"small random Llama, {name:42} relative error of the logits {float(error):.4f}", flush=True)


def model_parser(description: str | None, samples: int, every: int) -> argparse.ArgumentParser:
    """Options of a model, its calibration and its evaluation, with these defaults."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("calibration")
    parser.add_argument("data", help="folder with wiki.test.raw")
    parser.add_argument("--samples", type=int, default=samples)
    parser.add_argument("--seq-len", type=int, default=512)
    parser.add_argument("--every", type=int, default=every, help="of the evaluation windows, each so-many-th")
    return parser


def main() -> None:
    """Print one row per method and implementation."""
    parser = model_parser(__doc__, 32, 12)
    parser.add_argument("--bits", type=int, nargs="+", default=[4])
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--steps", type=int, default=200, help="of auto-round, a block")
    parser.add_argument("--seed", type=int, default=0, help="of the calibration windows")
    parser.add_argument("--only", nargs="*", help="rows, by the beginning of their names, at whose end stands a full stop")
    arguments = parser.parse_args()
    source = rosaq.open_source(arguments.model)
    held_out = text_windows(read_wikitext2(Path(arguments.data)), source.tokenizer)[:: arguments.every]
    logger.remove()
    if not torch.cuda.is_available():  # its AWQ pins memory, which PyTorch refuses without an accelerator
        IntermediatesCache.pin_memory = lambda *_, **__: None
    if not arguments.only:
        compare_codes()
        compare_small(arguments.bits[0], arguments.steps)
    calibration, dense = rosaq.Calibration(arguments.calibration, arguments.samples, arguments.seq_len, arguments.seed), save_dense(source)
    windows = read_windows(source, calibration, "cpu")
    for bits in arguments.bits:
        for name, make in all_rows(source, dense, windows, bits, arguments.device, arguments.steps).items():
            if arguments.only and not any(f"{name}.".startswith(beginning) for beginning in arguments.only):
                continue
            start = time.perf_counter()
            model = make().to(arguments.device)
            seconds = time.perf_counter() - start
            value = perplexity(model, held_out, no_progress).perplexity
            print(f"INT{bits} {name:42} perplexity {value:.3f}, made in {seconds:.0f} s", flush=True)
            del model


if __name__ == "__main__":
    main()
