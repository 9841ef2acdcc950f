"""Where our AWQ and llm-compressor's differ at few bits: one ingredient after another is exchanged, same calibration, grid and evaluation windows.

Usage: python scripts/explain_awq_difference.py MODEL CALIBRATION_FILE DATA [--samples 8] [--seq-len 512] [--every 24] [--bits 3] [--chance 0]
       [--first 0] [--keep LOSSES.pt] [--only NAME ...]

Both search a scale per input channel of a site among some 20, by what rounding then loses; ranges are not clipped. Three things are not alike:

    scales   "activations": mean |x| to the power 0, 1/20, ... 19/20 (ours; the paper's).
             "duo": mean |x|^r / mean |w|^(1 - r), r = 0, 1/18, ... 1, w in shares of its group's largest weight, and none (llm-compressor's default).
    loss     "layers": squared error of the outputs of the linear layers that the site feeds, summed (ours).
             "module": that of the whole attention or feed-forward module (llm-compressor).
    W_O      "scaled", alike for the query heads of a group (ours), or "left" under grouped queries (llm-compressor).

The end of a name says how weights are rounded at last: "FP16" or "float32" by the type of a group's scale, ranges whole, or "clipped" as
the recipe `awq` has it. All candidates' losses are measured once, with ranges whole; then every combination is a choice among them.
`--chance N` does a row N times more, each AWQ scale multiplied by 1 + u, u uniform within 1 %: the spread is chance.
`--first` skips so many calibration windows, `--keep` keeps the losses. It runs on the CPU and needs nothing but rosaq;
`compare_llm_compressor.py` has the real thing.
"""

import argparse
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

import torch

import rosaq
from rosaq.architecture import LINEARS, SITES
from rosaq.clock import no_progress
from rosaq.evaluation.perplexity import perplexity, read_wikitext2, text_windows
from rosaq.kernels.reference import dequantize
from rosaq.layout import LinearLayout
from rosaq.rounding.clipping import UNCLIPPED
from rosaq.rounding.grid import grouped, round_to_nearest, ungrouped
from rosaq.rounding.linear import Rounding, quantize_linear
from rosaq.rounding.scaling import moment_loss
from rosaq.skeleton import full_model
from rosaq.statistics import read_windows

GROUP, STEPS = 64, 20
Tensors = dict[str, torch.Tensor]
Tried = dict[str, dict[str, Any]]  # site -> "kinds": whose candidate, "scales" (C, K), "layers" and "module": losses (C,), "moment" (K, K)
Choice = tuple[dict[str, str], dict[str, str], str]  # scales and loss by site, W_O


def float_round(weight: torch.Tensor, layout: LinearLayout) -> torch.Tensor:
    """Rounding to nearest with float32 scales."""
    groups, top = grouped(weight, layout), (1 << layout.bits) - 1
    low, high = groups.amin(-1, keepdim=True).clamp_max(0), groups.amax(-1, keepdim=True).clamp_min(0)
    scale = (high - low).clamp_min(1e-12) / top
    zero = torch.round(-low / scale).clamp(0, top)
    return ungrouped((torch.round(groups / scale + zero).clamp(0, top) - zero) * scale, layout)


def rounded(weight: torch.Tensor, bits: int, store: str = "FP16", moment: torch.Tensor | None = None) -> torch.Tensor:
    """A weight on its grid; for a clipped one the second moment of what it sees."""
    layout = LinearLayout(weight.shape[0], weight.shape[1], bits, GROUP)
    if store == "clipped":
        return dequantize(layout, quantize_linear(weight, layout, None, moment, Rounding(clipping="awq")))
    return (round_to_nearest if store == "FP16" else float_round)(weight, layout)


def candidates(weight: torch.Tensor, magnitude: torch.Tensor) -> tuple[list[str], torch.Tensor]:
    """The scales (C, K) that either searches, with whose each is."""
    groups = weight.reshape(len(weight), -1, GROUP).abs()
    share = (groups / (groups.amax(-1, keepdim=True) + 1e-6)).reshape(weight.shape).mean(0)
    found = [("both", torch.ones_like(magnitude))]
    found += [("activations", magnitude.clamp_min(1e-8).pow(i / STEPS)) for i in range(1, STEPS)]
    ratios = [i / (STEPS - 2) for i in range(STEPS - 1)]
    found += [("duo", (magnitude.pow(r) / (share.pow(1 - r) + 1e-4)).clamp_min(1e-4)) for r in ratios]
    return [kind for kind, _ in found], torch.stack([(s / (s.max() * s.min()).sqrt()).clamp_min(1e-4) for _, s in found])


def record(model: Any, windows: torch.Tensor) -> list[dict[str, Any]]:
    """Of every block: the arguments of its attention and feed-forward module, and the inputs of its four sites."""
    kept: list[dict[str, Any]] = [{} for _ in model.model.layers]
    hooks = []
    for layer, into in zip(model.model.layers, kept, strict=True):
        for name in ("self_attn", "mlp"):

            def keep(_: Any, args: Any, more: Any, into: dict[str, Any] = into, name: str = name) -> None:
                into[name] = args, {key: value for key, value in more.items() if key != "past_key_values"}

            hooks.append(layer.get_submodule(name).register_forward_pre_hook(keep, with_kwargs=True))
        for site, roles in SITES.items():

            def see(_: Any, args: Any, into: dict[str, Any] = into, site: str = site) -> None:
                into[site] = args[0].flatten(0, -2)

            hooks.append(layer.get_submodule(LINEARS[roles[0]]).register_forward_pre_hook(see))
    model.model(windows, use_cache=False)
    for hook in hooks:
        hook.remove()
    return kept


def output(layer: Any, name: str, arguments: Any) -> torch.Tensor:
    """What a module of a block makes of its recorded arguments."""
    made = layer.get_submodule(name)(*arguments[0], **arguments[1])
    return made[0] if isinstance(made, tuple) else made


def measure_block(layer: Any, inputs: dict[str, Any], bits: int, heads: int, kv_heads: int) -> Tried:
    """The losses of all candidates of a block's sites, everything else as it was."""
    tried: Tried = {}
    for site, roles in SITES.items():
        linears = [layer.get_submodule(LINEARS[role]) for role in roles]
        original = [linear.weight.clone() for linear in linears]
        x, weight = inputs[site], torch.cat(original)
        magnitude = x.abs().mean(0)
        if site == "attn_out":
            magnitude = magnitude.view(kv_heads, heads // kv_heads, -1).mean(1, keepdim=True).expand(-1, heads // kv_heads, -1).flatten()
        kinds, scales = candidates(weight, magnitude)
        if site == "attn_out":  # only ours scales it, so only ours is tried
            kinds, scales = ["both"] * STEPS, scales[:STEPS]
        moment = x.T @ x / len(x)
        loss, module = moment_loss(moment), {"attn_in": "self_attn", "mlp_in": "mlp"}.get(site)
        wanted = output(layer, module, inputs[module]) if module else None
        layers, modules = [], []
        for scale in scales:
            made = [rounded(part * scale, bits) / scale for part in original]
            layers.append(loss(torch.cat(made) - weight))
            if module and wanted is not None:
                for linear, part in zip(linears, made, strict=True):
                    linear.weight.copy_(part)
                modules.append(float((output(layer, module, inputs[module]) - wanted).square().sum(dtype=torch.float64)))
        for linear, part in zip(linears, original, strict=True):
            linear.weight.copy_(part)
        tried[site] = {
            "kinds": kinds,
            "scales": scales.clone(),
            "layers": torch.tensor(layers),
            "module": torch.tensor(modules or layers),
            "moment": moment,
        }
    return tried


def measure(model: Any, windows: torch.Tensor, bits: int) -> list[Tried]:
    """The losses of all candidates of all blocks."""
    config, found = model.config, []
    for index, (layer, inputs) in enumerate(zip(model.model.layers, record(model, windows), strict=True)):
        found.append(measure_block(layer, inputs, bits, config.num_attention_heads, config.num_key_value_heads))
        print(f"block {index} searched", flush=True)
    return found


def chosen(tried: Tried, choice: Choice) -> dict[str, int]:
    """The number of each site's candidate."""
    scales, losses, out = choice
    numbers = {}
    for site, found in tried.items():
        if site == "attn_out" and out == "left":
            numbers[site] = 0
            continue
        allowed = torch.tensor([kind in ("both", scales[site]) for kind in found["kinds"]])
        numbers[site] = int(torch.where(allowed, found[losses[site]], torch.inf).argmin())
    return numbers


def put(model: Any, original: Tensors, found: list[Tried], choice: Choice, bits: int, store: str, generator: torch.Generator | None) -> None:
    """Round every linear layer under its chosen scale, which the layer's weight is then divided by again."""
    for index, tried in enumerate(found):
        for site, number in chosen(tried, choice).items():
            scale = tried[site]["scales"][number]
            if generator is not None:
                scale = scale * (1 + 0.01 * (2 * torch.rand(scale.shape, generator=generator) - 1))
            for role in SITES[site]:
                name, how = f"model.layers.{index}.{LINEARS[role]}", "FP16" if store == "clipped" and role in UNCLIPPED else store
                moment = tried[site]["moment"] / scale / scale[:, None]
                model.get_submodule(name).weight.copy_(rounded(original[name] * scale, bits, how, moment) / scale)


def combinations() -> dict[str, tuple[Choice, str]]:
    """Every combination by its name, ranges whole and clipped; then ours with llm-compressor's loss at one site."""

    def both(name: str) -> dict[str, str]:
        return dict.fromkeys(SITES, name)

    named = {
        f"{scales}, {loss}, W_O {out}, {store}": ((both(scales), both(loss), out), store)
        for store, out, loss, scales in product(("FP16", "float32", "clipped"), ("scaled", "left"), ("layers", "module"), ("activations", "duo"))
    }
    for site in ("attn_in", "mlp_in"):
        named[f"activations, module at {site} alone, W_O scaled, FP16"] = (both("activations"), both("layers") | {site: "module"}, "scaled"), "FP16"
    return named


def parser() -> argparse.ArgumentParser:
    """The options."""
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("model", "calibration", "data"):
        made.add_argument(name)
    for name, default in (("samples", 8), ("seq-len", 512), ("every", 24), ("bits", 3), ("chance", 0), ("first", 0)):
        made.add_argument(f"--{name}", type=int, default=default)
    made.add_argument("--keep", type=Path, help="file that the losses are kept in, and read from where it is there")
    made.add_argument("--only", nargs="*", help="rows, by the beginning of their names")
    return made


def main() -> None:
    """Print a row for each combination."""
    arguments = parser().parse_args()
    torch.set_grad_enabled(False)
    source = rosaq.open_source(arguments.model)
    calibration = rosaq.Calibration(arguments.calibration, arguments.first + arguments.samples, arguments.seq_len)
    windows = read_windows(source, calibration, "cpu")[arguments.first :]
    held_out = text_windows(read_wikitext2(Path(arguments.data)), source.tokenizer)[:: arguments.every]
    model = full_model(source, torch.float32)
    if arguments.keep and arguments.keep.exists():
        found = torch.load(arguments.keep)
    else:
        found = measure(model, windows, arguments.bits)
        if arguments.keep:
            torch.save(found, arguments.keep)
    original = {
        name: module.weight.clone() for name, module in model.named_modules() if name.rpartition("layers.")[1] and hasattr(module, "in_features")
    }
    row: Callable[[str, float], None] = lambda name, value: print(f"INT{arguments.bits} {name}: perplexity {value:.3f}", flush=True)  # noqa: E731
    for name, (choice, store) in combinations().items():
        if arguments.only and not any(name.startswith(beginning) for beginning in arguments.only):
            continue
        for seed in range(-1, arguments.chance):
            put(model, original, found, choice, arguments.bits, store, torch.Generator().manual_seed(seed) if seed >= 0 else None)
            row(name if seed < 0 else f"{name}, chance {seed}", perplexity(model, held_out, no_progress).perplexity)


if __name__ == "__main__":
    main()
