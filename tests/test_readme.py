"""README cannot drift: its commands exist and take the options that it names, its code runs, its trees are the tree."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PAGES = ["README.md", "CONTRIBUTING.md", *sorted(str(path.relative_to(ROOT)) for path in (ROOT / "docs").glob("*.md"))]


def blocks(page: str, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", (ROOT / page).read_text(), re.DOTALL)


def commands() -> list[tuple[str, list[str]]]:
    found = []
    for page in PAGES:
        for block in blocks(page, "bash") + blocks(page, ""):
            for line in block.replace("\\\n", " ").splitlines():
                if line.split(" ")[0] in ("rosaq", "make"):
                    found.append((page, shlex.split(line, comments=True)))
    return found


@pytest.fixture(scope="module")
def options():
    """Options of each rosaq command, from its help."""
    found = {}
    environment = {**os.environ, "COLUMNS": "200"}
    names = ("quantize", "distill", "evaluate", "compare", "inspect", "generate", "verify", "recipes", "serve", "export", "report")
    names += ("benchmark decode", "benchmark quantize")
    for command in names:
        line = [sys.executable, "-c", "from rosaq_cli.app import main; main()", *command.split(), "--help"]  # without torch, in a second
        help_text = subprocess.run(line, capture_output=True, text=True, check=True, env=environment)
        found[command] = set(re.findall(r"--?[a-z][a-z-]*", help_text.stdout))
    return found


def test_there_are_commands_to_check():
    assert {words[0] for _, words in commands()} == {"rosaq", "make"} and len(commands()) >= 6


def test_commands_exist_and_take_their_options(options):
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    for page, words in commands():
        if words[0] == "make":
            assert set(words[1:]) <= targets, f"{page}: {' '.join(words)}"
        else:
            if words[1] == "serve":
                words = words[:3]  # the others are vLLM's
            elif words[1] == "benchmark":
                words = ["rosaq", f"benchmark {words[2]}", *words[3:]]
            assert words[1] in options, f"{page}: {' '.join(words)}"
            unknown = {word for word in words[2:] if word.startswith("-")} - options[words[1]]
            assert not unknown, f"{page}: {' '.join(words)}: {unknown}"


def test_options_in_the_table_exist(options):
    named = set(re.findall(r"`(--[a-z-]+)`", (ROOT / "README.md").read_text()))
    assert named and named <= options["quantize"]


def test_the_first_code_block_runs(saved, tmp_path):
    code = blocks("README.md", "python")[0].replace("group_size=64, salient=64, salient_per_head=16", "group_size=16, salient=16, salient_per_head=4")
    scope = {"MODEL": str(saved("llama")), "OUT": str(tmp_path / "out")}
    exec(code, scope)
    assert scope["report"].bits_per_weight > 4 and scope["model"].is_quantized


def test_links_lead_somewhere():
    for page in PAGES:
        for target in re.findall(r"\]\(([^)#]+?)(?:#[^)]*)?\)", (ROOT / page).read_text()):
            if not target.startswith("http"):
                assert ((ROOT / page).parent / target).exists(), f"{page}: {target}"


def test_the_tree_in_the_architecture_page_is_the_tree():
    tree = next(block for block in blocks("docs/architecture.md", "") if "src/rosaq/" in block)
    named = set(re.findall(r"([a-z_]+(?:\.py|/))", tree.split("src/rosaq_cli/")[0])) - {"src/", "rosaq/", "recipes/"}
    nested = {
        "reference.py",
        "grid.py",
        "gptq.py",
        "scaling.py",
        "clipping.py",
        "transformers.py",
        "loading.py",
        "dense.py",
        "vllm.py",
        "vllm_layers.py",
        "shards.py",
        "perplexity.py",
        "quantizing.py",
        "zeroshot.py",
        "tasks.py",
        "likelihood.py",
        "kernels.py",
        "experiment.py",
        "measures.py",
        "worker.py",
        "table.py",
        "published.py",
        "observation.py",
        "channels.py",
        "errors.py",
        "report.py",
        "plots.py",
        "page.py",
        "serving.py",
        "export.py",
        "dummy.py",
        "decoding.py",
        "decoding_run.py",
        "model_shapes.py",
        "trainable.py",
        "training.py",
        "reading.py",
        "interactive.py",
        "static.py",
        "summary.py",
        "environment.py",
        "commands.py",
        "tables.py",
        "drawing.py",
    }
    source = ROOT / "src" / "rosaq"
    unnamed = ("recipes", "py.typed", "__init__.py", "__main__.py", "__pycache__")
    there = {path.name + ("/" if path.is_dir() else "") for path in source.iterdir() if path.name not in unnamed}
    assert named - nested == there
    assert all(list(source.rglob(name)) for name in nested)
