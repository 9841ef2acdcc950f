"""README cannot drift: its targets, options, links and trees exist. What its blocks do is tested in test_docs.py."""

import re

import typer

from pages import PAGES, ROOT, code_blocks
from rosaq_cli.app import app


def blocks(page: str, language: str) -> list[str]:
    return [block.text for block in code_blocks(page) if block.language == language]


def test_make_targets_exist():
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    blocks = [block for page in PAGES for block in code_blocks(page) if block.language == "bash"]
    named = {target for block in blocks for words in block.lines() if words[0] == "make" for target in words[1:]}
    named |= {target for page in PAGES for target in re.findall(r"`make ([a-z-]+)`", (ROOT / page).read_text())}
    assert {"demo", "docs", "test"} <= named <= targets


def test_options_in_the_table_exist():
    table = [line for line in (ROOT / "README.md").read_text().splitlines() if line.startswith("| `--")]
    named = {option for line in table for option in re.findall(r"`(--[a-z-]+)`", line.split("|")[1])}
    known = {option for entry in typer.main.get_command(app).commands["quantize"].params for option in entry.opts}
    assert len(named) >= 6 and named <= known


def test_links_lead_somewhere():
    for page in PAGES:
        for target in re.findall(r"\]\(([^)#]+?)(?:#[^)]*)?\)", (ROOT / page).read_text()):
            if not target.startswith("http"):
                assert ((ROOT / page).parent / target).exists(), f"{page}: {target}"


def test_the_tree_in_the_architecture_page_is_the_tree():
    tree = next(block for block in blocks("docs/architecture.md", "") if "src/rosaq/" in block)
    named = set(re.findall(r"([a-z_]+(?:\.py|/))", tree.split("src/rosaq_cli/")[0])) - {"src/", "rosaq/", "recipes/"}
    source = ROOT / "src" / "rosaq"
    unnamed = ("recipes", "py.typed", "__init__.py", "__main__.py", "__pycache__")
    there = {path.name + ("/" if path.is_dir() else "") for path in source.iterdir() if path.name not in unnamed}
    assert there <= named <= there | {path.name for path in source.glob("*/*.py")}
