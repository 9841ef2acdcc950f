"""Why our GPTQ and llm-compressor's give different perplexities on one model, calibration and grid: one part after another is exchanged.

Usage: python scripts/explain_gptq_difference.py MODEL CALIBRATION_FILE DATA [--samples 8] [--seq-len 512] [--every 37] [--bits 4] [--seeds 6]

It needs the environment of compare_llm_compressor.py, on the CPU. llm-compressor's GPTQ is run once; the moments and grids that it used are kept.
Then its rounding is run again: with its moments or ours, with its grids (float32 scales), ours (FP16 scales), or its own with scales times 1 + u,
u uniform within half of FP16's relative spacing, which is chance.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from compare_llm_compressor import GROUP, model_parser, save_dense, theirs
from compressed_tensors.quantization import QuantizationArgs
from llmcompressor.modifiers.gptq import base
from llmcompressor.modifiers.gptq.gptq_quantize import quantize_weight
from llmcompressor.pipelines.cache import IntermediatesCache
from loguru import logger

import rosaq
from rosaq.architecture import LINEARS, NORMS, SITE_NORM, SITES
from rosaq.clock import no_progress
from rosaq.evaluation.perplexity import perplexity, read_wikitext2, text_windows
from rosaq.layout import LinearLayout
from rosaq.moments import Flow, collect_moments
from rosaq.rounding.grid import fit_grid, grouped
from rosaq.skeleton import full_model
from rosaq.statistics import read_windows

HALF_SPACING = 2.0**-11  # FP16 rounds a scale by up to so much of itself
Tensors = dict[str, torch.Tensor]
Grid = tuple[torch.Tensor, torch.Tensor]  # scales and zero points, codes from 0


def run_theirs(dense: Path, windows: torch.Tensor, bits: int) -> tuple[Tensors, Tensors, dict[str, Grid]]:
    """llm-compressor's weights, and the moments and grids that it rounded with, by module."""
    kept: list[tuple[Any, torch.Tensor, Grid]] = []
    real = base.prepare_batch

    def keeping(batch: Any, *rest: Any) -> Any:
        made = real(batch, *rest)
        kept.extend((module, made[1][i].clone(), (made[2][i].float(), made[3][i].float() + 2 ** (bits - 1))) for i, module in enumerate(batch))
        return made

    with patch.object(base, "prepare_batch", keeping), torch.enable_grad():
        model = theirs(dense, windows, bits, "gptq", actorder=None)
    names = {id(module): name for name, module in model.named_modules()}
    weights = {names[id(module)]: module.weight.detach().clone() for module, _, _ in kept}
    return weights, {names[id(module)]: moment for module, moment, _ in kept}, {names[id(module)]: grid for module, _, grid in kept}


def our_moments(source: rosaq.Source, windows: torch.Tensor) -> Tensors:
    """Our second moments of what each linear layer sees: collected before the norm's weight, which is put back here."""
    found: Tensors = {}
    for index, sites in enumerate(collect_moments(source, windows, "cpu", torch.float32, Flow())):
        block = source.block(index)
        for site, moment in sites.items():
            gain = block[f"{NORMS[SITE_NORM[site]]}.weight"].float() if site in SITE_NORM else torch.ones(len(moment))
            seen = moment * gain * gain[:, None]
            found |= {f"{source.architecture.block_prefix(index)}{LINEARS[role]}": seen for role in SITES[site]}
    return found


def main() -> None:
    """Print a row for each exchange."""
    parser = model_parser(__doc__, 8, 37)
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--seeds", type=int, default=6, help="of the perturbed scales")
    arguments = parser.parse_args()
    logger.remove()
    torch.set_grad_enabled(False)
    IntermediatesCache.pin_memory = lambda *_, **__: None
    source, bits = rosaq.open_source(arguments.model), arguments.bits
    windows = read_windows(source, rosaq.Calibration(arguments.calibration, arguments.samples, arguments.seq_len), "cpu")
    held_out = text_windows(read_wikitext2(Path(arguments.data)), source.tokenizer)[:: arguments.every]
    wanted, moments, grids = run_theirs(save_dense(source), windows, bits)
    ours, model = our_moments(source, windows), full_model(source, torch.float32)
    original = {name: model.get_submodule(name).weight.clone() for name in wanted}
    layouts = {name: LinearLayout(weight.shape[0], weight.shape[1], bits, GROUP) for name, weight in original.items()}
    form = QuantizationArgs(num_bits=bits, type="int", strategy="group", group_size=GROUP, symmetric=False)
    apart = max(float((moments[n] / moments[n].norm() - ours[n] / ours[n].norm()).norm()) for n in ours)
    print(f"{len(ours)} layers; second moments of one norm differ by at most {apart:.1e}")

    def row(title: str, moment: Callable[[str], torch.Tensor], grid: Callable[[str], Grid]) -> None:
        equal, zeros = [], []
        for name, weight in original.items():
            scale, zero = grid(name)
            made = quantize_weight(weight[None].clone(), moment(name)[None].clone(), scale[None], (zero - 2 ** (bits - 1))[None], None, form)[0][0]
            model.get_submodule(name).weight.copy_(made)
            equal.append(float(((made - wanted[name]).abs() < 0.01 * grids[name][0].repeat_interleave(GROUP, 1)).float().mean()))
            zeros.append(float((zero != grids[name][1]).float().mean()))
        value, count = perplexity(model, held_out, no_progress).perplexity, len(equal)
        print(f"{title}: perplexity {value:.3f}, equal weights {sum(equal) / count:.4f}, other zero points {sum(zeros) / count:.4f}", flush=True)

    def perturbed(generator: torch.Generator) -> Callable[[str], Grid]:
        def grid(name: str) -> Grid:
            scale = grids[name][0] * (1 + HALF_SPACING * (2 * torch.rand(grids[name][0].shape, generator=generator) - 1))
            low = grouped(original[name], layouts[name]).amin(-1).clamp_max(0)
            return scale, torch.round(-low / scale).clamp(0, 2**bits - 1)

        return grid

    row("their moments, their grids", moments.__getitem__, grids.__getitem__)
    row("our moments, their grids", ours.__getitem__, grids.__getitem__)
    row("our moments, our grids", ours.__getitem__, lambda name: fit_grid(grouped(original[name], layouts[name]), bits))
    for seed in range(arguments.seeds):
        row(f"their moments, their grids with scales perturbed, seed {seed}", moments.__getitem__, perturbed(torch.Generator().manual_seed(seed)))


if __name__ == "__main__":
    main()
