"""`rosaq recipes`."""

from rosaq_cli.screen import show_table


def recipes() -> None:
    """List the recipes that come with rosaq."""
    from rosaq import load_recipe, shipped_recipes

    loaded = [load_recipe(name) for name in shipped_recipes()]
    show_table("recipes", ["name", "bits", "what it is"], [[recipe.name, str(recipe.bits), recipe.description] for recipe in loaded], "left")
