"""The commands that repeat what a report shows, out of what was recorded."""

import shlex
from pathlib import Path
from typing import Any

from rosaq.comparison.experiment import PERPLEXITY, TASKS
from rosaq.recipe import Recipe, load_recipe, shipped_recipes
from rosaq.report.reading import Evidence, Found
from rosaq.report.summary import quantized

# What options of the command line can change in a recipe: of `benchmark quantize`, of `compare`, of `quantize`.
TIMED = ("group_size", "salient", "salient_per_head")
COMPARED = (*TIMED, "salient_down")
QUANTIZED = ("bits", *COMPARED, "target_bits")


def commands(evidence: Evidence) -> list[str]:
    """One line for each thing that was measured; folders and files by their last name."""
    lines = [_quantize(model.name, model.report) for model in quantized(evidence)]
    lines += [_compare(one) for one in evidence.of("comparison")]
    lines += [_inspect(one) for one in evidence.of("inspection")]
    for one in evidence.of("evaluation"):
        against = [] if one.data["against"] is None else ["--against", one.data["against"]]
        every = ["--every", one.data["every"]] if one.data["every"] > 1 else []
        texts = ["--tasks", ",".join(one.data["texts"])] if one.data["texts"] else []
        lines.append(_line("evaluate", one.data["model"], *against, *texts, *every, "--dtype", one.data["dtype"], "--json"))
    for one in evidence.of("kernels"):
        dtype = str(one.data["rows"][0]["dtype"]).removeprefix("torch.")
        lines.append(_line("benchmark", "kernels", "--dtype", dtype, "-o", one.path.name))
    lines += [_decode(one) for one in evidence.of("decoding")]
    lines += [_timed(one) for one in evidence.of("quantizing")]
    return lines


def _line(*words: Any) -> str:
    """A command; a place on the disk it was run on is of no use on another, so only its last part is kept."""
    return shlex.join(["rosaq", *(Path(word).name if (word := str(given)).startswith(("/", "~")) else word for given in words)])


def _quantize(name: str, report: dict[str, Any]) -> str:
    recipe = report["recipe"]
    return _line(
        "quantize",
        report.get("model") or "MODEL",
        "-o",
        name,
        "--recipe",
        _named(recipe),
        *_recipe_options([recipe], QUANTIZED),
        *_text(report["calibration"]),
    )


def _compare(one: Found) -> str:
    quantized_by = [cell.recipe for cell, _ in one.cells if cell.recipe is not None and cell.checkpoint is None]
    recipes, bits = {recipe.name: recipe for recipe in quantized_by}, dict.fromkeys(recipe.bits for recipe in quantized_by if not recipe.target_bits)
    checkpoints = [str(cell.checkpoint) for cell, _ in one.cells if cell.checkpoint is not None]
    seeds = sorted({cell.seed for cell, _ in one.cells if cell.seed is not None})
    tasks = [task for task in TASKS if any(task in values["figures"] for _, values in one.cells)]
    common, more = one.data, []
    if tasks != [PERPLEXITY]:
        more += ["--tasks", ",".join(tasks)]
    more += _recipe_options([recipe.to_dict() for recipe in recipes.values()], COMPARED)
    more += ["--calibration", common["calibration text"], "--samples", common["samples"], "--seq-len", common["seq_len"]]
    for name, usual in (("window", 2048), ("windows", None), ("dtype", "auto")):
        if common[name] != usual:
            more += [f"--{name}", common[name]]
    more += ["--limit", common["documents"]] if common["documents"] is not None else []
    more += [] if common["data"] == "hub" else ["--data", "DATA"]
    more += ["--checkpoints", ",".join(checkpoints)] if checkpoints else []
    names = ",".join(_named(recipe.to_dict()) for recipe in recipes.values())
    given = ["--recipes", names, "--bits", ",".join(map(str, bits)), "--seeds", ",".join(map(str, seeds))]
    return _line("compare", common["model"], "-o", one.name, *(given if recipes else []), *more)


def _inspect(one: Found) -> str:
    settings, checkpoint = one.data["settings"], one.data["checkpoint"]
    more = ["--checkpoint", checkpoint] if checkpoint else []
    sizes = ["--salient", settings["salient"], "--salient-per-head", settings["salient_per_head"]]
    return _line("inspect", one.data["model"], "-o", one.path.parent.name, *more, *_text(one.data["calibration"]), *sizes)


def _decode(one: Found) -> str:
    rows, settings = one.data["rows"], one.data["settings"]
    engines = [word for engine in dict.fromkeys(row["engine"] for row in rows) for word in ("--engine", engine)]
    weights = [word for kind in dict.fromkeys(row["weights"] for row in rows) for word in ("--weights", kind)]
    pairs = ",".join(f"{batch}/{tokens}" for batch, tokens in settings["pairs"])
    more = ["--tensor-parallel", settings["tensor_parallel"]] if settings["tensor_parallel"] > 1 else []
    given = ["--pairs", pairs, "--dtype", settings["dtype"], "--kv-cache-dtype", settings["kv_cache_dtype"], "--repeats", settings["repeats"]]
    return _line("benchmark", "decode", one.data["model"], *engines, *weights, *given, *more, "-o", one.path.name)


def _timed(one: Found) -> str:
    report, (samples, length) = one.data["report"], one.data["tokens"]
    sizes = _recipe_options([report["recipe"]], TIMED)
    blocks = ["--blocks", one.data["blocks"]] if one.data["blocks"] != one.data["blocks_of_model"] else []
    given = ["--recipe", _named(report["recipe"]), *sizes, "--samples", samples, "--seq-len", length, *(["--warm"] if one.data["warm"] else [])]
    line = _line("benchmark", "quantize", one.data["shape"], "--folder", "FOLDER", *blocks, *given, "-o", one.path.name)
    return line if one.data["ranks"] == 1 else f"torchrun --nproc-per-node {one.data['ranks']} -m {line}"


def _text(calibration: dict[str, Any]) -> list[Any]:
    names = {"text": "--calibration", "samples": "--samples", "seq_len": "--seq-len", "seed": "--seed"}
    return [word for key, option in names.items() if key in calibration for word in (option, calibration[key])]


def _named(values: dict[str, Any]) -> str:
    """What `--recipe` must be given: the name, or a file where the recipe is not the shipped one of that name in all but sizes.

    An allocation is found again for the target that the recipe names; `compare` writes the target behind the name.
    """
    recipe = Recipe.from_dict(values)
    stem, _, target = recipe.name.rpartition("-")
    if recipe.target_bits and stem in shipped_recipes() and target == f"{recipe.target_bits:g}":
        return f"{stem}@{target}"
    if recipe.name not in shipped_recipes():
        return f"{recipe.name}.toml"
    sizes = {size: getattr(recipe, size) for size in QUANTIZED}
    again = load_recipe(recipe.name).replace(**sizes, allocation=recipe.allocation if recipe.target_bits else None)
    return recipe.name if again.to_dict() == recipe.to_dict() else f"{recipe.name}.toml"


def _recipe_options(recipes: list[dict[str, Any]], sizes: tuple[str, ...]) -> list[Any]:
    """Options for the sizes in which recipes differ from those that are shipped under their names."""
    shipped = [(Recipe.from_dict(recipe), load_recipe(recipe["name"])) for recipe in recipes if recipe["name"] in shipped_recipes()]
    found: list[Any] = []
    for size in sizes:
        changed = [getattr(recipe, size) for recipe, usual in shipped if getattr(recipe, size) != getattr(usual, size)]
        if changed:
            found += [f"--{size.replace('_', '-')}", changed[0]]
    return found
