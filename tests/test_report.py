"""`rosaq report`: what it finds, the numbers that it shows, the page in a browser, its figures, its refusals."""

import json
import os
import random
import re
import shutil
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from conftest import random_model, tokenizer
from rosaq import Calibration, load_recipe, quantize
from rosaq.benchmark import kernels
from rosaq.benchmark.decoding import Settings as Pairs
from rosaq.benchmark.decoding import Timing, rows
from rosaq.comparison.experiment import Experiment, sized
from rosaq.comparison.published import SOURCE
from rosaq.comparison.run import compare
from rosaq.comparison.table import make_table
from rosaq.engines.loading import load_model
from rosaq.evaluation.perplexity import divergence, text_windows
from rosaq.inspection.page import write
from rosaq.inspection.report import Settings, inspect
from rosaq.layout import LinearLayout
from rosaq.report.commands import commands
from rosaq.report.interactive import to_json
from rosaq.report.page import make_page, sections
from rosaq.report.plots import all_plots, pareto_front
from rosaq.report.reading import read_evidence
from rosaq.report.static import draw, write_figures
from rosaq.report.summary import sentences

SIZES = {"group_size": 16, "salient": 16, "salient_per_head": 4, "salient_down": 16}
SECTIONS = ["checkpoints", "evaluations", "pareto", "table5", "magnitudes", "table8", "spectra", "errors", "times"]
SECTIONS += ["kernels", "peers", "decoding", "environment", "commands"]
WIDTHS = {"phone": 390, "tablet": 820, "desktop": 1440}
CHROMIUM = next((found for name in ("chromium", "chromium-browser", "google-chrome") if (found := shutil.which(name))), None)


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """A folder with everything that a report can be made of, of a tiny model; times of peers are invented."""
    folder, draw_letter = tmp_path_factory.mktemp("measured"), random.Random(7)
    random_model("llama").save_pretrained(folder / "model")
    tokenizer().save_pretrained(folder / "model")
    texts = ["".join(draw_letter.choices("abcdefghijklmnopqrstuvwxyz    .,", k=400)) for _ in range(20)]
    (folder / "text.txt").write_text("\n\n".join(texts))
    (folder / "data").mkdir()
    (folder / "data" / "wiki.test.raw").write_text("\n".join(texts[:4]))
    there = folder / "results"
    there.mkdir()
    calibration, model = Calibration(str(folder / "text.txt"), 2, 32), str(folder / "model")
    recipe = load_recipe("rosaq-int4").replace(**SIZES)
    report = quantize(model, there / "tiny-int4", recipe, calibration, "cpu")
    (there / "run.json").write_text(json.dumps(vars(report)))
    write(inspect(model, None, Settings(8, 4, 3), there / "tiny-int4", "cpu"), there / "inspection")
    recipes = tuple(sized(load_recipe(name), **SIZES) for name in ("rtn", "mixed", "rosaq-int4"))
    wanted = Experiment(model, recipes, seeds=(0, 1), calibration=calibration, data=folder / "data", window=32)
    table = make_table("a table", compare(wanted, there / "compare", ("cpu",)))
    (there / "compare" / "table.csv").write_text(table.csv() + f"INT4,AWQ,{SOURCE},{',' * 4}5.6,,,\n")
    quantized, words = load_model(str(there / "tiny-int4"), "cpu")
    figures = divergence(quantized, load_model(model, "cpu")[0], text_windows(texts[0], words, 32), lambda *_: None)
    entry = {"model": "tiny-int4", "against": model, "device": "cpu", "dtype": "float32", "packed": False, "every": 2}
    tasks = {name: {"accuracy": 0.75, "standard_error": 0.1, "questions": 20} for name in ("piqa", "mmlu_anatomy")}
    answered = {"tasks": tasks, "averages": {"csr": tasks["piqa"]}}
    (there / "evaluate.json").write_text(json.dumps({**entry, "texts": {"wikitext2": figures.to_dict()}, "zeroshot": answered}))
    (there / "benchmarks").mkdir()
    (there / "benchmarks" / "kernels.json").write_text(json.dumps({"hardware": "a GPU", "torch": "2.11", "rows": kernel_rows()}))
    seconds = {"open": 1.0, "activations": 5.0, "rounding": 4.0}
    case = {"shape": "tiny", "blocks": 2, "blocks_of_model": 4, "ranks": 2, "hardware": "CPU", "warm": True, "tokens": [8, 64]}
    every = {**seconds, "activations": 10.0, "rounding": 8.0}
    timed = {**case, "report": {**vars(report), "seconds": seconds}, "seconds_of_all_blocks": every}
    (there / "benchmarks" / "tiny.json").write_text(json.dumps(timed))
    (there / "benchmarks" / "decode.json").write_text(json.dumps(decoded()))
    return there


def kernel_rows():
    times = {1: (10.0, 30.0, 9.0), 16: (12.0, 31.0, 15.0)}
    found = []
    for layer, outputs, bits in (("llama2 qkv", 12288, 4), ("llama2 o", 4096, 4), ("llama2 qkv", 12288, 3)):
        layout = LinearLayout(outputs, 4096, bits, 128, salient=128)
        for tokens, (ours, cublas, marlin) in times.items():
            found.append(kernels._row(layer, layout, tokens, torch.float16, {"rosaq": ours, "cublas": cublas, "marlin": marlin}, 4e12))
    return found


def decoded():
    steps = {"fp16": {"1/16": 10.0, "4/16": 12.0}, "rosaq": {"1/16": 5.0, "4/16": 8.0}, "marlin": {"1/16": 4.0, "4/16": 8.0}}
    details = {"torch": "2.11", "device": "a GPU", "vllm": "0.24"}
    timings = [Timing("vllm", weights, found, details) for weights, found in steps.items()]
    settings = {**vars(Pairs(((1, 16), (4, 16)))), "pairs": [[1, 16], [4, 16]]}
    return {"model": "llama-2-7b", "recipe": "rosaq-int4", "settings": settings, "rows": rows(timings), "failures": []}


@pytest.fixture(scope="module")
def evidence(measured):
    return read_evidence([measured])


@pytest.fixture(scope="module")
def page(evidence, tmp_path_factory):
    file = tmp_path_factory.mktemp("page") / "report.html"
    file.write_text(make_page(evidence), encoding="utf-8")
    return file


def plots_of(text):
    """The plots in a page, by name: what its script reads."""
    found = [json.loads(part) for part in re.findall(r'<script type="application/json">(.*?)</script>', text, re.DOTALL)]
    return {plot["name"]: plot for plot in found}


def test_everything_is_found_by_what_is_in_it(measured, evidence):
    kinds = {"checkpoint", "comparison", "inspection", "run", "evaluation", "kernels", "decoding", "quantizing"}
    assert {one.kind for one in evidence.found} == kinds and len(evidence.found) == len(kinds)
    one = read_evidence([measured / "benchmarks" / "decode.json", measured / "benchmarks"])  # a file, and again in its folder
    assert [found.kind for found in one.found] == ["decoding", "kernels", "quantizing"]
    order = [(cell.name) for cell, _ in evidence.of("comparison")[0].cells][:5]
    assert order == ["original", "rtn.int4.seed0", "rtn.int4.seed1", "mixed.int4.seed0", "mixed.int4.seed1"]


def test_the_summary_says_what_was_measured(measured, evidence):
    report = json.loads((measured / "run.json").read_text())
    figures = json.loads((measured / "evaluate.json").read_text())["texts"]["wikitext2"]
    size, loss, speed = sentences(evidence)
    assert f"{report['bits_per_weight']:.2f} bits per weight, {report['checkpoint_bytes'] / 1e6:.1f} MB against" in size
    assert f"{figures['model']['perplexity']:.2f} against the original's {figures['reference']['perplexity']:.2f}" in loss
    assert speed == "It decodes 2.00 times as fast as FP16 in vllm at batch 1."
    (kernel,) = sentences(read_evidence([measured / "benchmarks" / "kernels.json"]))
    assert kernel.startswith("The kernel is 1.07 times as fast as the fastest peer")  # the median of 0.9 and 1.25, twice each
    (best,) = sentences(read_evidence([measured / "compare"]))
    perplexities = [
        values["figures"]["wikitext2"]["perplexity"] for cell, values in evidence.of("comparison")[0].cells if cell.name.startswith("mixed.int4")
    ]
    lowest = min((row for row in table(evidence).rows if row.bits == 4 and not row.published), key=lambda row: row.figures["WikiText-2 PPL"].value)
    assert f"at INT4 {lowest.method}'s, {lowest.figures['WikiText-2 PPL'].value:.2f}" in best
    assert next(row for row in table(evidence).rows if row.method == "mixed").figures["WikiText-2 PPL"].value == pytest.approx(sum(perplexities) / 2)


def table(evidence):
    one = evidence.of("comparison")[0]
    return make_table("", list(one.cells), one.published)


def test_the_page_has_every_section_and_needs_no_network(page, measured, evidence):
    text = page.read_text()
    assert [section.name for section in sections(evidence)] == SECTIONS == re.findall(r'<section id="(\w+)"', text)
    outside = text.replace(re.search(r"<script>\s*/\*\*.*?</script>", text, re.DOTALL)[0], "")  # without plotly's own source
    assert not re.search(r"(src|href)=\"(?!data:|#)", outside) and "http:" not in outside and "https:" not in outside
    assert f"{json.loads((measured / 'evaluate.json').read_text())['texts']['wikitext2']['model']['perplexity']:.3f} ± " in text
    assert "mmlu_anatomy" not in text and text.count("75.00 ± 10.00") == 2
    assert "INT4 AWQ (published)" in text and "5.60" in text
    assert len(re.findall(r'<tr class="[^"]*ours', text)) == 2  # rosaq-int4 at 4 and at 3 bits


def test_plots_have_the_data(page, measured, evidence):
    plots = plots_of(page.read_text())
    assert set(plots) == {"pareto", "magnitudes", "spectra", "errors", "times", "kernels", "peers", "decoding"}
    for plot in plots.values():
        assert plot["views"] and all(trace.get("y") or trace.get("z") for traces in plot["views"].values() for trace in traces)
        keys = {tuple(key.split("\n")) for key in plot["views"]}
        assert all(tuple(part in choice["values"] for part, choice in zip(key, plot["choices"], strict=True)) for key in keys)
    inspection = json.loads((measured / "inspection" / "inspection.json").read_text())
    drawn = {plot.name: plot for plot in all_plots(evidence)}
    before, after = drawn["magnitudes"].views["inspection", "attention input", "1"]
    assert before.y == inspection["blocks"][1]["attn_in"]["magnitude"]["own"] and after.y == inspection["blocks"][1]["attn_in"]["magnitude"]["global"]
    heat = drawn["errors"].views["inspection", "output"]
    assert heat.values[heat.y.index("up")][1] == next(e["output"] for e in inspection["errors"] if (e["role"], e["block"]) == ("up", 1))
    assert sum(drawn["spectra"].views["inspection", "attention output"][0].y) == pytest.approx(1)
    ours, cublas, marlin, limit = drawn["kernels"].views["kernels", "llama2 qkv, INT4"]
    row = kernel_rows()[0]
    assert (ours.name, cublas.name, marlin.name, limit.name) == ("rosaq", "cublas", "marlin", "limit") and set(limit.y) == {1.0}
    assert ours.y[0] == pytest.approx(row["limit_us"] / 10) and cublas.y[0] == pytest.approx(row["limit_us"] / 30)
    peers = drawn["peers"].views["kernels",]
    assert peers.values == [[pytest.approx(0.9), pytest.approx(1.25)]] * 3 and peers.y == ["llama2 qkv, INT4", "llama2 o, INT4", "llama2 qkv, INT3"]
    bars = {series.name: series for series in drawn["decoding"].views["decode", "vllm"]}
    assert bars["rosaq"].y == [200.0, 500.0] and "2.00 times FP16, 0.80 times the best peer" in bars["rosaq"].notes[0]
    stages = json.loads((measured / "run.json").read_text())["seconds"]
    assert drawn["times"].views["run",][0].y == list(stages.values())
    assert drawn["times"].views["tiny: tiny",][0].y == [1.0, 10.0, 8.0]
    (times,) = next(section for section in sections(evidence) if section.name == "times").tables
    assert times.rows[0].cells[:7] == ["tiny", "tiny", "rosaq-int4", "2 of 4", "2 x CPU", "10.0", "19.0"]
    methods = {series.name: series for series in drawn["pareto"].views["compare",]}
    assert methods["rosaq-int4"].bold and not methods["mixed"].bold and len(methods["rtn"].x) == 2
    found = next(row for row in table(evidence).rows if (row.method, row.bits) == ("rosaq-int4", 3))
    assert methods["rosaq-int4"].y[0] == pytest.approx(found.figures["WikiText-2 PPL"].value)
    assert methods["rosaq-int4"].spread[0] == pytest.approx(found.figures["WikiText-2 PPL"].spread)


def test_the_pareto_front():
    assert pareto_front([(4.3, 30), (4.7, 24), (5.0, 25), (3.3, 80), (5.4, 23.9)]) == [(3.3, 80), (4.3, 30), (4.7, 24), (5.4, 23.9)]


def test_text_in_a_plot_cannot_end_its_script(evidence):
    plot = next(plot for plot in all_plots(evidence) if plot.name == "times")
    object.__setattr__(plot, "title", "</script><b>")
    assert "<" not in to_json(plot) and json.loads(to_json(plot))["title"] == "</script><b>"


def test_the_commands_repeat_what_was_done(evidence):
    lines = commands(evidence)
    assert lines[0].startswith(
        "rosaq quantize model -o tiny-int4 --recipe rosaq-int4 --group-size 16 --salient 16 --salient-per-head 4 --salient-down 16"
    )
    assert lines[0].endswith("--calibration text.txt --samples 2 --seq-len 32 --seed 0")
    assert "rosaq compare model -o compare --recipes rtn,mixed,rosaq-int4 --bits 4,3 --seeds 0,1 --group-size 16" in lines[1]
    assert "--window 32" in lines[1] and not any("/" in word for line in lines for word in line.replace("1/16,4/16", "").split())
    assert lines[-1].startswith(
        "torchrun --nproc-per-node 2 -m rosaq benchmark quantize tiny --folder FOLDER --blocks 2 --recipe rosaq-int4 --group-size 16"
    )
    for line in [line.removeprefix("torchrun --nproc-per-node 2 -m ") for line in lines]:  # and the command line takes them
        command = re.match(r"rosaq ((?:benchmark )?\w+)", line)[1]
        code = "from rosaq_cli.app import main; main()"
        shown = subprocess.run(
            [sys.executable, "-c", code, *command.split(), "--help"], capture_output=True, text=True, env={**os.environ, "COLUMNS": "200"}
        )
        assert set(re.findall(r" (--[a-z-]+)", line)) <= set(re.findall(r"--[a-z-]+", shown.stdout)), line


def test_cells_of_checkpoints_have_their_own_rows(measured, tmp_path):
    shutil.copytree(measured / "compare", tmp_path / "compare")
    shutil.copy(tmp_path / "compare" / "cells" / "rosaq-int4.int3.seed0.json", tmp_path / "compare" / "cells" / "checkpoint.distilled.json")
    found = read_evidence([tmp_path / "compare"])
    assert [(row.bits, row.method) for row in table(found).rows if row.method == "distilled"] == [(3, "distilled")]
    drawn = next(plot for plot in all_plots(found) if plot.name == "pareto").views["compare",]
    assert next(series for series in drawn if series.name == "distilled").bold
    assert "--recipes rtn,mixed,rosaq-int4 --bits 4,3" in commands(found)[0] and "--checkpoints distilled" in commands(found)[0]


def test_figures_for_a_paper(evidence, tmp_path):
    plots = all_plots(evidence)
    written = write_figures(plots, tmp_path / "one")
    assert len(written) == 2 * len(plots) == 16
    write_figures(plots, tmp_path / "two")
    for file in written:  # no date, no random id
        assert file.read_bytes() == (tmp_path / "two" / file.name).read_bytes()
    named = {plot.name: plot for plot in plots}
    axes = draw(named["magnitudes"]).axes
    assert [axis.get_title() for axis in axes[:3]] == ["attention input, block 0", "attention input, block 1", "feed-forward input, block 0"]
    assert list(axes[1].get_lines()[1].get_ydata()) == list(named["magnitudes"].views["inspection", "attention input", "1"][1].y)


def test_the_command(measured, tmp_path):
    from typer.testing import CliRunner

    from rosaq_cli.app import app

    done = CliRunner().invoke(app, ["report", str(measured), "-o", str(tmp_path / "r.html"), "--figures", str(tmp_path / "figures"), "--json"])
    assert done.exit_code == 0, done.output
    told = json.loads(done.stdout)
    assert len(told["found"]) == 8 and len(told["figures"]) == 16 and all(Path(file).is_file() for file in told["figures"])
    assert (tmp_path / "r.html").read_text().startswith("<!doctype html>")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda folder: None, "nothing here that a report is made of; known are rosaq.json of a checkpoint"),
        (lambda folder: (folder / "other.json").write_text('{"a": 1}'), "nothing here that a report is made of"),
        (lambda folder: (folder / "list.json").write_text("[1]"), "nothing here that a report is made of"),
        (lambda folder: (folder / "cut.json").write_text('{"rows": ['), "cut.json: not valid JSON"),
        (lambda folder: (folder / "comparison.json").write_text("{}"), "a comparison without a finished cell"),
        (lambda folder: folder.rmdir(), "no such folder or file"),
    ],
)
def test_what_is_refused(tmp_path, make, message):
    (tmp_path / "given").mkdir()
    make(tmp_path / "given")
    with pytest.raises(ValueError, match=re.escape(message)):
        read_evidence([tmp_path / "given"])


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("run.json", {"bits_per_weight": 4, "seconds": {}, "recipe": {}, "calibration": {}}),
        ("evaluation.json", {"model": "m", "texts": 3, "zeroshot": None}),
        ("evaluation.json", {"model": "m", "texts": {}, "zeroshot": None}),
        ("inspection.json", {"table8": {}, "blocks": [], "errors": []}),
        ("quantizing.json", {"seconds_of_all_blocks": {}, "report": {}}),
        ("kernels.json", {"rows": [{"microseconds": 1, "limit_us": 1}]}),
        ("decoding.json", {"rows": [{"step_ms": 1, "weights": "rosaq"}], "settings": {}}),
    ],
)
def test_a_file_that_only_seems_to_be_ours_is_named(measured, tmp_path, name, value):
    """Also among others that are whole."""
    (tmp_path / name).write_text(json.dumps(value))
    with pytest.raises(ValueError, match=rf"{name}: looks like '\w+', but is not as rosaq writes that \(\w+Error: "):
        make_page(read_evidence([measured / "inspection", tmp_path]))


def test_an_older_checkpoint_and_a_single_kind_make_a_page(measured, tmp_path):
    """A checkpoint without the model's name; and each thing by itself has its own sections only."""
    shutil.copytree(measured / "tiny-int4", tmp_path / "old")
    manifest = json.loads((tmp_path / "old" / "rosaq.json").read_text())
    manifest["report"].pop("model", None)
    manifest["distillation"] = {"before": {"kl_divergence": 0.5}, "after": {"kl_divergence": 0.25}}
    (tmp_path / "old" / "rosaq.json").write_text(json.dumps(manifest))
    assert "KL after" in sections(read_evidence([tmp_path / "old"]))[0].tables[0].head
    assert [section.name for section in sections(read_evidence([tmp_path / "old"]))] == ["checkpoints", "environment", "commands"]
    for place, wanted in (("compare", "pareto"), ("inspection", "magnitudes"), ("benchmarks", "kernels"), ("run.json", "times")):
        assert wanted in {section.name for section in sections(read_evidence([measured / place]))}


@contextmanager
def browser():
    if CHROMIUM is None:
        pytest.skip("no Chromium here (apt-get install chromium)")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        try:
            yield chromium
        finally:
            chromium.close()


def opened(chromium, page, width, scheme):
    """The page at a width, offline, and all that the console said or that was asked of the network."""
    tab = chromium.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme, offline=True).new_page()
    said = []
    tab.on("console", lambda message: said.append(message.text))
    tab.on("pageerror", lambda error: said.append(str(error)))
    tab.on("request", lambda request: said.append(request.url) if not request.url.startswith(("file:", "data:", "blob:")) else None)
    tab.goto(page.as_uri())
    return tab, said


def test_in_a_browser(page):
    with browser() as chromium:
        for scheme in ("light", "dark"):
            for width in WIDTHS.values():
                tab, said = opened(chromium, page, width, scheme)
                traces = tab.evaluate("[...document.querySelectorAll('.canvas')].map((canvas) => canvas.data.length)")
                assert len(traces) == 8 and all(traces) and said == []
                assert tab.evaluate("document.documentElement.scrollWidth") <= width  # tables scroll inside themselves
                drawn = tab.evaluate("[...document.querySelectorAll('.canvas .main-svg')].every((svg) => svg.clientWidth <= innerWidth)")
                text = tab.evaluate("getComputedStyle(document.querySelector('.canvas .xtitle')).fill")
                assert drawn and (max(map(int, re.findall(r"\d+", text)[:3])) < 100) == (scheme == "light"), text
                tab.context.close()


def test_a_person_chooses_and_prints(page, tmp_path):
    with browser() as chromium:
        tab, said = opened(chromium, page, WIDTHS["desktop"], "dark")
        before = tab.evaluate("document.querySelector('#plot-magnitudes .canvas').data[0].y[0]")
        tab.select_option("#plot-magnitudes select >> nth=2", "1")
        assert tab.evaluate("document.querySelector('#plot-magnitudes .canvas').data[0].y[0]") != before
        for name, dark in (("light", False), ("dark", True), ("system", True)):
            tab.click("#theme")
            assert tab.inner_text("#theme") == f"theme: {name}"
            assert (tab.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(20, 23, 28)") == dark
        tab.pdf(path=tmp_path / "printed.pdf", prefer_css_page_size=True)
        assert (tmp_path / "printed.pdf").stat().st_size > 10_000 and said == []
        assert tab.evaluate("document.querySelector('#plot-pareto .canvas').layout.width") is None  # as wide as the page again
