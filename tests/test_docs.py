"""The documentation cannot drift: it builds without a warning, its commands parse, its code runs, the format page decodes checkpoints."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
import torch
import typer

from conftest import random_model, tokenizer
from pages import NEEDS, PAGES, RECORDS, ROOT, CodeBlock, code_blocks, rosaq_lines
from rosaq import Recipe, load_recipe, quantize, shipped_recipes
from rosaq.architecture import FAMILIES
from rosaq.kernels.reference import dequantize
from rosaq.layout import LinearLayout
from rosaq_cli.app import app
from test_cli import run

RUN = [page for page in PAGES if page not in RECORDS]
FORMAT = "docs/checkpoint-format.md"
# What makes a documented command small; the last of a repeated option counts.
SMALL = {
    "quantize": ["--samples", "2", "--seq-len", "32", "--device", "cpu"],
    "compare": ["--samples", "2", "--seq-len", "32", "--window", "32", "--windows", "4", "--devices", "cpu"],
    "distill": ["--samples", "16", "--seq-len", "32", "--epochs", "1", "--device", "cpu"],
    "evaluate": ["--window", "32", "--limit", "4", "--device", "cpu"],
    "inspect": ["--samples", "2", "--seq-len", "32", "--device", "cpu"],
    "generate": ["--max-tokens", "3", "--device", "cpu"],
    "verify": ["--device", "cpu"],
    "export": [],
    "recipes": [],
    "report": [],
}


def parsed(words):
    """Options of a rosaq command line by name, as the real command line reads them; its usage error where it does not."""
    group = typer.main.get_command(app)
    if words[0].startswith("-"):
        assert words[0] in {option for entry in group.params for option in entry.opts}
        return {}
    name = words.pop(0)
    command = group.commands[name]
    if hasattr(command, "commands"):
        command = command.commands[words.pop(0)]
    return command.make_context(name, words).params


def test_the_command_line_takes_every_documented_command():
    lines = rosaq_lines()
    assert len(lines) > 40
    for page, words in lines:
        try:
            options = parsed(["4" if word == "BITS" else word for word in words])
        except Exception as error:
            raise AssertionError(f"{page}: rosaq {' '.join(words)}: {error}") from error
        recipes = [options["recipe"]] if options.get("recipe") else (options.get("recipes") or "").split(",")
        for recipe in (word.partition("@")[0] for word in recipes if word):
            assert recipe.endswith(".toml") or recipe == "RECIPE" or recipe in shipped_recipes(), f"{page}: {recipe}"


def test_an_unknown_option_would_be_seen():
    with pytest.raises(Exception, match="No such option"):
        parsed(["quantize", "model", "-o", "out", "--colour", "red"])


def test_what_is_not_run_says_why():
    for page in RUN:
        for block in code_blocks(page):
            assert block.needs in ("", *NEEDS), f"{page}: needs {block.needs!r}"
            if block.language == "bash" and not block.needs:
                assert {words[0] for words in block.lines()} == {"rosaq"}, f"{page}: {block.text}"
                assert {words[1] for words in block.lines()} <= set(SMALL), f"{page}: {block.text}"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """What the pages speak of: `model`, `text.txt`, `data`, and a checkpoint `model-int4`, of a random model wide enough for the defaults."""
    home = tmp_path_factory.mktemp("pages")
    sizes = dict(vocab_size=320, hidden_size=256, intermediate_size=384, num_attention_heads=4, num_key_value_heads=2, head_dim=64)
    random_model("llama", **sizes).save_pretrained(home / "model")
    tokenizer(320).save_pretrained(home / "model")
    letters, generator = "abcdefghijklmnopqrstuvwxyz     .,", torch.Generator().manual_seed(7)
    text = "".join(letters[i] for i in torch.randint(len(letters), (6000,), generator=generator))
    (home / "text.txt").write_text(text)
    (home / "data").mkdir()
    (home / "data" / "wiki.test.raw").write_text(text)
    quantize(str(home / "model"), home / "checkpoint", "rosaq-int4", torch.arange(64).view(2, 32), "cpu")
    return home


def run_block(block: CodeBlock, scope: dict, monkeypatch, capfd) -> None:
    if block.language == "python":
        exec(compile(block.text, block.page, "exec"), scope)
    elif block.language == "toml":
        name = re.search(r'^name = "(.*)"$', block.text, re.MULTILINE)[1]
        Path(f"{name}.toml").write_text(block.text)
    elif block.language == "bash":
        for words in block.lines():
            code, out, err = run(monkeypatch, capfd, *words[1:], *SMALL[words[1]])
            assert code == 0, f"{block.page}: {' '.join(words)}: {err}"
            assert not ("--quiet" in words and out), out
            if "--json" in words:
                json.loads(out)


@pytest.mark.parametrize("page", RUN)
def test_the_code_of_a_page_runs(page, folder, tmp_path, monkeypatch, capfd):
    blocks = [block for block in code_blocks(page) if not block.needs]
    for name in ("model", "text.txt", "data"):
        (tmp_path / name).symlink_to(folder / name)
    if not any(" -o model-int4" in block.text for block in blocks):  # a page that does not make it itself
        (tmp_path / "model-int4").symlink_to(folder / "checkpoint")
    monkeypatch.chdir(tmp_path)
    scope = {"MODEL": "model", "OUT": "out"}
    monkeypatch.setitem(FAMILIES, "newllama", FAMILIES["llama"])  # the page on adding a family does, and monkeypatch takes it away again
    for block in blocks:
        run_block(block, scope, monkeypatch, capfd)


@pytest.fixture(scope="module")
def decode_checkpoint():
    """The decoder of the format's page, which may use numpy and safetensors only."""
    blocks = [block.text for block in code_blocks(FORMAT) if block.language == "python"]
    imports = {line for block in blocks for line in block.splitlines() if re.match(r"(import|from) ", line)}
    assert imports == {"import json", "import numpy as np", "from safetensors import safe_open"}
    scope: dict = {}
    exec("\n".join(blocks).replace('weights = decode_checkpoint("model-int4")', ""), scope)
    return scope["decode_checkpoint"]


CASES = ("rosaq-nearest", "rosaq-int3", "rosaq-paper", "mixed", "rtn", "rosaq-heads-concatenated", "quarot-r4", "odd")
ODD = Recipe("odd", bits=3, group_size=48, salient=20, salient_per_head=5, salient_bits=8, embedding_bits="8")


@pytest.mark.parametrize(("name", "family"), [(name, "llama-biased") for name in CASES] + [("rosaq-int4", "qwen2"), ("rosaq-int4", "qwen3")])
def test_the_format_page_decodes_what_we_write(name, family, saved, tmp_path, decode_checkpoint):
    recipe = ODD if name == "odd" else load_recipe(name)
    if recipe is not ODD:
        sizes = dict(group_size=16, salient=16, salient_per_head=4, salient_down=8)
        recipe = recipe.replace(**{key: value for key, value in sizes.items() if getattr(recipe, key)})
    changes = dict(intermediate_size=96) if name == "quarot-r4" else {}  # a width that has a Hadamard matrix
    quantize(str(saved(family, **changes)), tmp_path / "out", recipe, torch.arange(64).view(2, 32), "cpu")
    compare_with_ours(tmp_path / "out", decode_checkpoint(tmp_path / "out"), embedding=family == "qwen2" or recipe.embedding_bits == "8")


def test_the_format_page_decodes_the_golden_checkpoint(decode_checkpoint):
    golden = ROOT / "tests" / "golden" / "checkpoint"
    compare_with_ours(golden, decode_checkpoint(golden), embedding=True)


def compare_with_ours(folder, weights, embedding):
    from safetensors.torch import load_file

    config = json.loads((folder / "config.json").read_text())
    stored = load_file(folder / "model.safetensors")
    assert len(weights) == 7 * config["num_hidden_layers"] + 2 * embedding
    layouts = config["quantization_config"]["layouts"]
    for module, weight in weights.items():
        form = layouts.get(module) or layouts[module.split(".", 3)[-1]]
        tensors = {key.rpartition(".")[2]: value for key, value in stored.items() if key.rpartition(".")[0] == module}
        ours = dequantize(LinearLayout(*weight.shape, bias="bias" in tensors, **form), tensors)
        assert np.array_equal(weight, ours.numpy()), module


def test_the_format_page_names_every_tensor_and_key(saved, tmp_path):
    page = (ROOT / FORMAT).read_text()
    layout = LinearLayout(8, 32, 4, 16, salient=4, salient_bits=8, bias=True, ordered=True)
    named = [*layout.tensors(), *layout.form(), "rotation"]
    recipe = load_recipe("rosaq-heads-concatenated").replace(group_size=16, salient=16, salient_per_head=4)
    quantize(str(saved()), tmp_path / "out", recipe, torch.arange(64).view(2, 32), "cpu")
    named += json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    named += json.loads((tmp_path / "out" / "rosaq.json").read_text())
    assert len(named) > 20
    assert [name for name in named if f"`{name}`" not in page] == []


def test_the_picture_stands_alone_in_light_and_dark():
    text = (ROOT / "docs" / "images" / "rosaq.svg").read_text()
    drawing = ElementTree.fromstring(text)
    assert "prefers-color-scheme: dark" in text and "http" not in text.replace("http://www.w3.org/2000/svg", "")
    kinds = [element.get("class") for element in drawing.iter("{http://www.w3.org/2000/svg}rect")]
    assert kinds.count("raw") == 72 and kinds.count("salient") == 8 + 1 and kinds.count("rest") == 64 + 1 and kinds[0] == "card"


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    out = tmp_path_factory.mktemp("site")
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(out)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "WARNING" not in done.stderr, done.stderr
    return out


def test_the_site_has_every_page_and_loads_nothing_from_elsewhere(site):
    for page in (ROOT / "docs").glob("*.md"):
        html = (site / f"{page.stem}.html").read_text()
        loaded = re.findall(r"<(?:script|img|source|iframe)[^>]*\ssrc=[\"']?([^\"' >]+)", html)
        loaded += re.findall(r"<link[^>]*rel=[\"']?(?:stylesheet|icon|preconnect|preload)[^>]*href=[\"']?([^\"' >]+)", html)
        assert loaded and [target for target in loaded if "//" in target] == [], page
    styles = "".join(path.read_text() for path in site.rglob("*.css"))
    assert re.findall(r"url\([\"']?(https?:[^)]+)", styles) == []


def test_the_site_lists_every_option_and_every_name_of_the_library(site):
    import rosaq

    commands, api = ((site / f"{page}.html").read_text() for page in ("command-line", "api"))
    for name, command in typer.main.get_command(app).commands.items():
        for entry in [] if hasattr(command, "commands") else command.params:
            for option in entry.opts:
                assert f"<code>{option}</code>" in commands or entry.param_type_name == "argument", f"{name} {option}"
    for name in rosaq.__all__:
        assert name == "__version__" or f'id="rosaq.{name}"' in api, name
