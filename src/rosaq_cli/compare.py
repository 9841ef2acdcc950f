"""`rosaq compare`."""

from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from rosaq_cli.evaluate import check_counts
from rosaq_cli.screen import errors, results, show_json, show_table, silence_transformers, stage_bars

if TYPE_CHECKING:  # loading it takes seconds, which `rosaq --help` must not
    from rosaq import Recipe
    from rosaq.comparison.table import Table

DEFAULT = "rtn,mixed,rosaq-paper,rosaq-int4"


def compare(
    model: Annotated[str, typer.Argument(help="Hub id, local Hugging Face folder, or .gguf file.", show_default=False)],
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder of results: made, or gone on with.", show_default=False)],
    recipes: Annotated[str, typer.Option(help="Shipped recipes or .toml files, by commas; NAME@3.9 with a target of bits per weight.")] = DEFAULT,
    bits: Annotated[list[str] | None, typer.Option(help="Bits of a quantized weight, repeated or by commas.", show_default="4,3")] = None,
    seeds: Annotated[str, typer.Option(help="Seeds of the calibration text, by commas.")] = "0",
    tasks: Annotated[str, typer.Option(help="wikitext2, csr (seven zero-shot tasks), mmlu, by commas.")] = "wikitext2",
    task_seeds: Annotated[str | None, typer.Option(help="Seeds that get all tasks; the others wikitext2 only.", show_default="the first")] = None,
    data: Annotated[Path | None, typer.Option(help="Folder with the tasks' data.", show_default="the hub")] = None,
    group_size: Annotated[int | None, typer.Option(help="Channels that share a scale.", show_default="recipe's")] = None,
    salient: Annotated[int | None, typer.Option(help="Channels of q, k, v, gate, up that stay precise, if any do.", show_default="recipe's")] = None,
    salient_per_head: Annotated[int | None, typer.Option(help="Channels of each head of o that do.", show_default="recipe's")] = None,
    salient_down: Annotated[int | None, typer.Option(help="Channels of down that do.", show_default="recipe's")] = None,
    calibration: Annotated[str, typer.Option(help="pile, c4, wikitext2 (hub), self, or a .txt/.jsonl file.")] = "pile",
    samples: Annotated[int, typer.Option(help="Calibration windows.")] = 128,
    seq_len: Annotated[int, typer.Option(help="Tokens per calibration window.")] = 2048,
    window: Annotated[int, typer.Option(help="Tokens per window of perplexity.")] = 2048,
    windows: Annotated[int | None, typer.Option(help="Use the first so many windows only.", show_default="all")] = None,
    limit: Annotated[int | None, typer.Option(help="Use the first so many documents of each other task only.", show_default="all")] = None,
    published: Annotated[str | None, typer.Option(help="Add the paper's figures of this model, which yours must be.", show_default="none")] = None,
    devices: Annotated[str, typer.Option(help="auto, cpu, cuda:N, or several by commas: one process each.")] = "auto",
    dtype: Annotated[str, typer.Option(help="Type to evaluate in: auto (float32 on the CPU), float32, float16, bfloat16.")] = "auto",
    kl: Annotated[bool, typer.Option("--kl", help="Measure the divergence from the original, too.")] = False,
    checkpoints: Annotated[str | None, typer.Option(help="Checkpoints of this model as further rows, by commas.", show_default="none")] = None,
    keep: Annotated[bool, typer.Option("--keep", help="Keep the checkpoints, in OUTPUT/checkpoints.")] = False,
    json_output: Annotated[bool, typer.Option("--json", help="Print all cells as JSON.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", help="No progress bars and no line for each cell.")] = False,
) -> None:
    """Quantize by each recipe, evaluate each packed checkpoint, and write one table as Markdown, CSV and HTML.

    pareto.md has the rows by bits per weight, pareto.svg and pareto.png draw them where matplotlib is installed.

    A cell is a recipe at its bits and calibration seed; each has a JSON file. The same command goes on where it stopped; several may share a folder.
    """
    from rosaq import Calibration, open_source
    from rosaq.comparison.experiment import Experiment, sized
    from rosaq.comparison.published import published as of_the_paper
    from rosaq.comparison.run import compare as run
    from rosaq.comparison.table import make_table
    from rosaq.engines.loading import check_dtype

    silence_transformers()
    check_counts({"--window": window, "--windows": windows, "--limit": limit})
    check_dtype(dtype)
    chosen = tuple(sized(_recipe(name), group_size, salient, salient_per_head, salient_down) for name in _words("recipes", recipes))
    experiment = Experiment(
        model, chosen, _numbers("bits", ",".join(bits or ["4,3"])), _numbers("seeds", seeds), _words("tasks", tasks),
        None if task_seeds is None else _numbers("task-seeds", task_seeds), Calibration(calibration, samples, seq_len),
        data, window, windows, limit, dtype, kl, tuple(Path(name) for name in _words("checkpoints", checkpoints)) if checkpoints else (),
    )  # fmt: skip
    paper = None if published is None else of_the_paper(published, open_source(model).architecture)
    with stage_bars(quiet or json_output) as progress:
        measured = run(experiment, output, _words("devices", devices), keep, _silent if quiet else announce, progress)
    table = make_table(f"{Path(model).name}: {len(chosen)} recipes", measured, paper)
    _write(output, table)
    if json_output:
        show_json({"cells": {cell.name: values for cell, values in measured}})
    else:
        show_table(table.title, *table.console())
        results.print(f"{output / 'table.md'}, table.csv, table.html", highlight=False, soft_wrap=True)


def _recipe(word: str) -> "Recipe":
    """A recipe by its name or file, with a target behind an @."""
    from rosaq import load_recipe

    name, at, target = word.partition("@")
    recipe = load_recipe(name)
    if not at:
        return recipe
    try:
        target_bits = float(target)
    except ValueError:
        raise ValueError(f"--recipes {word!r}: the target behind @ is {target!r}; it must be a number of bits per weight, such as 3.9") from None
    return recipe.replace(name=f"{recipe.name}-{target}", target_bits=target_bits)


def _write(output: Path, table: "Table") -> None:
    """The table in all its forms."""
    from rosaq.comparison import pareto
    from rosaq.comparison.results import write_text

    for suffix, text in (("md", table.markdown()), ("csv", table.csv()), ("html", table.html())):
        write_text(output / f"table.{suffix}", text)
    write_text(output / "pareto.md", pareto.markdown(table))
    if find_spec("matplotlib") is not None and pareto.points(table):
        figure = pareto.plot(table)
        for suffix in ("svg", "png"):
            figure.savefig(output / f"pareto.{suffix}", dpi=150)


def announce(line: str) -> None:
    """One line on standard error, from any process."""
    errors.print(line, style="dim", markup=False, highlight=False, soft_wrap=True)


def _silent(line: str) -> None:
    """No line."""


def _words(name: str, text: str) -> tuple[str, ...]:
    words = tuple(word.strip() for word in text.split(",") if word.strip())
    if not words:
        raise ValueError(f"--{name} is empty; give one or more, separated by commas")
    return words


def _numbers(name: str, text: str) -> tuple[int, ...]:
    try:
        return tuple(int(word) for word in _words(name, text))
    except ValueError as error:
        raise ValueError(f"--{name} is {text!r}; it must be whole numbers, separated by commas") from error
