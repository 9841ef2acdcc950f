"""`rosaq recipes`."""

import importlib.util
from pathlib import Path
from typing import Annotated

import typer

from rosaq_cli.screen import show_json, show_table


def complete_recipe(incomplete: str) -> list[str]:
    """Shipped recipes that begin so, for the shell's completion; without importing the library, which takes seconds."""
    place = importlib.util.find_spec("rosaq")
    folders = [] if place is None else place.submodule_search_locations or []
    names = sorted(file.stem for folder in folders for file in Path(folder, "recipes").glob("*.toml"))
    return [name for name in names if name.startswith(incomplete)]


def recipes(json_output: Annotated[bool, typer.Option("--json", help="Print the table as JSON.")] = False) -> None:
    """List the recipes that come with rosaq, with their average bits per weight at 4, 3 and 2 bits."""
    from rosaq import load_recipe, shipped_recipes
    from rosaq.architecture import LLAMA2_7B
    from rosaq.plan import make_plan

    rows = []
    for recipe in map(load_recipe, shipped_recipes()):
        spent = [make_plan(recipe.replace(bits=bits), LLAMA2_7B).bits_per_weight for bits in (4, 3, 2)]
        rows.append([recipe.name, str(recipe.bits), *(f"{bits:.2f}" for bits in spent), recipe.description])
    columns = ["name", "bits", "bits per weight, INT4", "INT3", "INT2", "what it is"]
    if json_output:
        show_json({"model": "Llama-2-7B", "recipes": [dict(zip(columns, row, strict=True)) for row in rows]})
    else:
        show_table("recipes; bits per weight for the shape of Llama-2-7B, of the decoder's linear layers, all that is stored", columns, rows, "left")
