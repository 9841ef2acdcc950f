"""A hook of mkdocs: the page of the command line gets every command's options, from the commands themselves."""

import html
from collections.abc import Iterator
from typing import Any

import typer

from rosaq_cli.app import app

PLACE = "\nCOMMANDS\n"


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Called by mkdocs for each page, before it is rendered."""
    if page.file.src_uri != "command-line.md":
        return markdown
    assert PLACE in markdown
    return markdown.replace(PLACE, "\n" + "\n\n".join(_commands(typer.main.get_command(app), "rosaq")) + "\n")


def _commands(group: Any, prefix: str) -> Iterator[str]:
    for name, command in group.commands.items():
        if hasattr(command, "commands"):
            yield from _commands(command, f"{prefix} {name}")
            continue
        arguments = " ".join(entry.name.upper() for entry in command.params if entry.param_type_name == "argument")
        rows = "\n".join(_row(entry) for entry in command.params if entry.name != "help")
        yield f"### {prefix} {name}\n\n`{prefix} {name} {arguments}`\n\n{command.help}\n\n| | default | |\n| --- | --- | --- |\n{rows}"


def _row(entry: Any) -> str:
    names = f"`{entry.name.upper()}`" if entry.param_type_name == "argument" else " ".join(f"`{name}`" for name in entry.opts)
    return f"| {names} | {html.escape(_default(entry))} | {html.escape(entry.help or '').replace('|', '&#124;')} |"


def _default(entry: Any) -> str:
    if entry.required:
        return "required"
    if isinstance(entry.show_default, str):
        return entry.show_default
    if isinstance(entry.default, bool):
        return "on" if entry.default else "off"
    return "none" if entry.default is None else ", ".join(map(str, entry.default if isinstance(entry.default, list) else [entry.default]))
