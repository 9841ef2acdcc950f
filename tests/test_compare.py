"""`rosaq compare`: every cell once, whatever happens between, and one table out of them."""

import csv
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch
from rich.console import Console

from conftest import random_model, tokenizer
from rosaq import Calibration, load_recipe, measure, open_source, quantize
from rosaq.architecture import Architecture
from rosaq.clock import no_progress
from rosaq.comparison.experiment import Cell, Experiment, fingerprint, sized
from rosaq.comparison.measures import Measures, task_figures
from rosaq.comparison.published import published
from rosaq.comparison.results import Results
from rosaq.comparison.run import compare
from rosaq.comparison.table import make_table
from rosaq.comparison.worker import Worker
from rosaq.engines.loading import load_model
from rosaq.evaluation.perplexity import perplexity, read_wikitext2, text_windows
from rosaq.version import __version__

LETTERS = "abcdefghijklmnopqrstuvwxyz     .,"
SIZES = {"group_size": 16, "salient": 16, "salient_per_head": 4}


@pytest.fixture
def data(tmp_path):
    folder, draw = tmp_path / "data", random.Random(3)
    folder.mkdir()
    (folder / "wiki.test.raw").write_text("\n".join("".join(draw.choices(LETTERS, k=60)) for _ in range(12)))
    return folder


@pytest.fixture
def experiment(saved, text_file, data):
    """A function (**changes) -> two recipes at two bits on a tiny model."""
    original = saved("llama")

    def make(**changes):
        recipes = tuple(sized(load_recipe(name), **SIZES) for name in ("rtn", "rosaq-paper"))
        given = dict(model=str(original), recipes=recipes, calibration=Calibration(str(text_file), 2, 32), data=data, window=32)
        return Experiment(**{**given, **changes})

    return make


def table_of(measured):
    return make_table("a table", measured)


def test_cells_hold_what_a_run_by_hand_gives(experiment, tmp_path, data):
    wanted = experiment(seeds=(0, 1))
    measured = compare(wanted, tmp_path / "out", ("cpu",))
    assert [cell.name for cell, _ in measured[:3]] == ["original", "rtn.int4.seed0", "rosaq-paper.int4.seed0"] and len(measured) == 9
    cell, values = next((cell, values) for cell, values in measured if cell.name == "rosaq-paper.int3.seed1")
    source = open_source(wanted.model)
    statistics = measure(source, Calibration(wanted.calibration.text, 2, 32, seed=1), "cpu")
    report = quantize(source, tmp_path / "by-hand", cell.recipe, statistics, "cpu")
    model, words = load_model(str(tmp_path / "by-hand"), "cpu")
    by_hand = perplexity(model, text_windows(read_wikitext2(data), words, 32), no_progress)
    figures = values["figures"]["wikitext2"]
    assert figures["perplexity"] == by_hand.perplexity and figures["standard_error"] == by_hand.standard_error
    assert values["bits_per_weight"] == report.bits_per_weight and values["calibration"] == statistics.record
    run = values["runs"][0]
    assert run["versions"]["torch"] == torch.__version__ and run["versions"]["rosaq"] == __version__
    assert run["hardware"]["device"] == "cpu" and run["peak_host_bytes"] > 10**7
    assert {"quantize: rounding", "loading", "perplexity", "whole cell"} <= set(run["seconds"])
    assert json.loads((tmp_path / "out" / "cells" / f"{cell.name}.json").read_text()) == values
    assert list((tmp_path / "out" / "checkpoints").iterdir()) == []


def test_a_recipe_may_distil(experiment, tmp_path):
    """Its cell says what training brought; its rows go with others."""
    recipe = sized(load_recipe("rosaq-distilled"), **SIZES, salient_down=16).replace(distillation_windows=8, distillation_epochs=1)
    measured = compare(
        experiment(recipes=(load_recipe("rtn").replace(group_size=16), recipe), bits=(3,), divergence=True), tmp_path / "out", ("cpu",)
    )
    values = {cell.name: values for cell, values in measured}["rosaq-distilled.int3.seed0"]
    assert values["distillation"]["after"]["kl_divergence"] <= values["distillation"]["before"]["kl_divergence"]
    assert values["runs"][0]["seconds"]["quantize: distillation"] > 0 and values["figures"]["wikitext2"]["kl_divergence"] > 0


def test_the_table(experiment, tmp_path):
    measured = compare(experiment(seeds=(0, 1)), tmp_path / "out", ("cpu",))
    table = table_of(measured)
    assert [(row.section, row.method) for row in table.rows] == [
        ("FP16", "original"), ("INT4", "rtn"), ("INT4", "rosaq-paper"), ("INT3", "rtn"), ("INT3", "rosaq-paper"),
    ]  # fmt: skip
    one, two = (values["figures"]["wikitext2"]["perplexity"] for cell, values in measured if cell.name.startswith("rosaq-paper.int4"))
    figure = table.rows[2].figures["WikiText-2 PPL"]
    assert figure.value == pytest.approx((one + two) / 2) and figure.spread == pytest.approx(abs(one - two) / 2**0.5) and one != two
    lines = table.markdown().splitlines()
    assert lines[2] == "| bits | method | bits/weight | WikiText-2 PPL |" and len({line.count("|") for line in lines[2:9]}) == 1
    assert f"| INT4 | rosaq-paper | {table.rows[2].figures['bits/weight'].value:.3f} | {figure.value:.2f} ± {figure.spread:.2f} |" in lines
    rows = list(csv.DictReader(table.csv().splitlines()))
    assert float(rows[2]["WikiText-2 PPL"]) == figure.value and float(rows[2]["WikiText-2 PPL spread"]) == figure.spread
    assert rows[0]["WikiText-2 PPL spread"] == "" and float(rows[0]["WikiText-2 PPL standard error"]) > 0
    page = table.html()
    assert page.count("<tr") == 6 and f"{figure.value:.2f} ± {figure.spread:.2f}" in page and "http" not in page


def test_the_same_command_gives_the_same_table_and_measures_nothing_again(experiment, tmp_path):
    baselines = ("gptq", "gptq-act-order", "awq", "quarot-gptq", "spinquant", "mixed", "rosaq-random")
    recipes = tuple(sized(load_recipe(name), **SIZES) for name in baselines)
    recipes = tuple(recipe.replace(learning_steps=2) if recipe.learning_steps else recipe for recipe in recipes)
    tables = [table_of(compare(experiment(recipes=recipes, bits=(3,)), tmp_path / name, ("cpu",))) for name in ("a", "b")]
    assert tables[0].csv() == tables[1].csv() and len({row.figures["WikiText-2 PPL"].value for row in tables[0].rows}) == 1 + len(baselines)
    first, second = (table_of(compare(experiment(), tmp_path / name, ("cpu",))).csv() for name in ("one", "two"))
    assert first == second
    times = {path: path.stat().st_mtime_ns for path in (tmp_path / "one" / "cells").iterdir()}
    assert table_of(compare(experiment(), tmp_path / "one", ("cpu",))).csv() == first
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "one" / "cells").iterdir()} == times


def test_moments_are_collected_once_for_a_seed(experiment, tmp_path, monkeypatch):
    passes = []
    from rosaq import statistics

    real = statistics.collect_moments
    monkeypatch.setattr(statistics, "collect_moments", lambda *arguments: passes.append(1) or real(*arguments))
    gptq = tuple(load_recipe("rosaq-paper").replace(name=f"g{bits}", rounding="gptq", salient_bits=bits, **SIZES) for bits in (8, 16))
    compare(experiment(recipes=gptq, seeds=(0, 1)), tmp_path / "out", ("cpu",))
    assert len(passes) == 2  # two recipes at two bits with two seeds


def two_workers(results, source):
    """As two processes have them."""
    return [Worker(results, source, Measures(results.experiment, source.tokenizer), "cpu", rank) for rank in (0, 1)]


def test_moments_are_collected_once_for_a_seed_by_all_processes(experiment, tmp_path, monkeypatch):
    from rosaq import statistics

    passes, real = [], statistics.collect_moments
    monkeypatch.setattr(statistics, "collect_moments", lambda *arguments: passes.append(1) or real(*arguments))
    recipes = tuple(load_recipe(name).replace(group_size=16) for name in ("gptq", "awq", "quarot-gptq"))
    wanted = experiment(recipes=(*recipes, load_recipe("gptq").replace(name="sink", group_size=16, sink_weight=4)), bits=(3,))
    source = open_source(wanted.model)
    results = Results(tmp_path / "out", wanted, source)
    first, second = two_workers(results, source)
    for cell in wanted.cells():
        (second if cell.recipe and cell.recipe.name in ("awq", "sink") else first)._try(cell)
    assert len(passes) == 2  # all tokens alike, and first tokens counted four times
    kept = {path.name for path in (tmp_path / "out" / "shared").iterdir()}
    assert kept == {f"statistics.seed0{end}.safetensors" for end in ("", ".moments1", ".moments4")}
    assert table_of(compare(wanted, tmp_path / "out", ("cpu",))).csv() == table_of(compare(wanted, tmp_path / "alone", ("cpu",))).csv()
    assert not list((tmp_path / "out" / "shared").iterdir())


def test_statistics_are_measured_once_for_a_seed_by_all_processes(experiment, tmp_path, monkeypatch):
    from rosaq.comparison import worker

    measured, real = [], worker.measure
    monkeypatch.setattr(worker, "measure", lambda *arguments: measured.append(1) or real(*arguments))
    wanted = experiment(seeds=(0, 1))
    source = open_source(wanted.model)
    results = Results(tmp_path / "out", wanted, source)
    first, second = two_workers(results, source)
    for cell in wanted.cells():
        (first if cell.recipe is None or cell.recipe.name == "rtn" else second)._try(cell)
    assert len(measured) == 2 and len(list((tmp_path / "out" / "shared").iterdir())) == 2
    assert table_of(compare(wanted, tmp_path / "out", ("cpu",))).csv() == table_of(compare(wanted, tmp_path / "alone", ("cpu",))).csv()
    assert not list((tmp_path / "out" / "shared").iterdir())  # they are large


def test_rotations_are_learned_once_for_a_seed_and_bits(experiment, tmp_path, monkeypatch):
    from rosaq import job

    learned, real = [], job.learn
    monkeypatch.setattr(job, "learn", lambda *arguments: learned.append(1) or real(*arguments))
    nearest, feedback = (sized(load_recipe(name), **SIZES).replace(learning_steps=2) for name in ("spinquant", "spinquant-gptq"))
    compare(experiment(recipes=(nearest,), seeds=(0, 1)), tmp_path / "out", ("cpu",))
    assert len(learned) == 4
    again = compare(experiment(recipes=(nearest, feedback), seeds=(0, 1)), tmp_path / "out", ("cpu",))  # as another process would
    assert len(learned) == 4
    alone = compare(experiment(recipes=(feedback,), seeds=(0, 1)), tmp_path / "alone", ("cpu",))
    assert len(learned) == 8
    perplexities = [
        {cell.name: values["figures"] for cell, values in measured if cell.name.startswith("spinquant-gptq")} for measured in (again, alone)
    ]
    assert perplexities[0] == perplexities[1] and len(perplexities[0]) == 4
    wanted = experiment(recipes=(nearest, feedback))
    results = [Results(tmp_path / "held", wanted, open_source(wanted.model)) for _ in range(2)]
    four, three = (Cell(feedback.replace(bits=bits), 0, ("wikitext2",)) for bits in (4, 3))
    with results[0].learning(Cell(nearest, 0, ("wikitext2",))) as mine, results[1].learning(four) as same, results[1].learning(three) as other:
        assert (mine, same, other) == (True, False, True)


def test_killed_and_gone_on_with(experiment, tmp_path, text_file, data):
    wanted = experiment()
    whole = table_of(compare(wanted, tmp_path / "whole", ("cpu",))).csv()
    sizes = ["--group-size", "16", "--salient", "16", "--salient-per-head", "4", "--window", "32", "--samples", "2", "--seq-len", "32"]
    command = [
        sys.executable, "-m", "rosaq", "compare", wanted.model, "-o", tmp_path / "out", "--recipes", "rtn,rosaq-paper", "--bits", "4", "--bits", "3",
        "--data", data, "--calibration", text_file, "--devices", "cpu", *sizes,
    ]  # fmt: skip
    running = subprocess.Popen([str(word) for word in command], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    cells = tmp_path / "out" / "cells"
    while running.poll() is None and not (cells / "rtn.int4.seed0.json").is_file():
        time.sleep(0.005)
    running.send_signal(signal.SIGKILL)
    running.wait()
    done = {path.name for path in cells.glob("*.json")}
    assert "rtn.int4.seed0.json" in done and len(done) < 5, done
    left = tmp_path / "out" / "checkpoints" / ".rosaq-paper.int4.seed0.partial-abc"  # as a killed writer leaves it
    left.mkdir()
    times = {name: (cells / name).stat().st_mtime_ns for name in done}
    again = subprocess.run([str(word) for word in command], capture_output=True, text=True, check=False)
    assert again.returncode == 0 and "rosaq-paper.int3.seed0" in again.stderr and "rtn.int4.seed0" not in again.stderr, again.stderr
    assert {name: (cells / name).stat().st_mtime_ns for name in done} == times and not left.exists()
    assert (tmp_path / "out" / "table.csv").read_text() == whole
    assert (tmp_path / "out" / "table.md").is_file() and (tmp_path / "out" / "table.html").is_file()


def test_several_processes_share_the_cells(experiment, tmp_path):
    whole = table_of(compare(experiment(), tmp_path / "whole", ("cpu",))).csv()
    assert table_of(compare(experiment(), tmp_path / "out", ("cpu", "cpu"))).csv() == whole
    for file in (tmp_path / "out" / "cells").glob("*.json"):
        assert len(json.loads(file.read_text())["runs"]) == 1


def test_a_claim_ends_with_its_process(experiment, tmp_path):
    wanted = experiment()
    results = Results(tmp_path / "out", wanted, open_source(wanted.model))
    cell = wanted.cells()[1]
    lock = str(results.folder / "claims" / f"{cell.name}.lock")
    held = f"import fcntl, time; f = open({lock!r}, 'w'); fcntl.flock(f, fcntl.LOCK_EX); print(1, flush=True); time.sleep(60)"
    other = subprocess.Popen([sys.executable, "-c", held], stdout=subprocess.PIPE)
    assert other.stdout.read(1) == b"1"
    with results.claim(cell) as mine:
        assert not mine
    os.kill(other.pid, signal.SIGKILL)
    other.wait()
    with results.claim(cell) as mine:
        assert mine


def test_tasks_may_be_added_and_other_experiments_are_refused(experiment, saved, tmp_path, text_file):
    out = tmp_path / "out"
    compare(experiment(), out, ("cpu",))
    assert len(compare(experiment(seeds=(0, 1), bits=(4,)), out, ("cpu",))) == 5  # more cells may be added
    with pytest.raises(ValueError, match="holds another comparison: samples is 2 there and 3 here"):
        compare(experiment(calibration=Calibration(str(text_file), 3, 32)), out, ("cpu",))
    with pytest.raises(ValueError, match="window is 32 there and 16 here"):
        compare(experiment(window=16), out, ("cpu",))
    changed = tuple(sized(load_recipe(name), 32) for name in ("rtn",))
    with pytest.raises(ValueError, match="recipe 'rtn' had group_size 16, now 32"):
        compare(experiment(recipes=changed), out, ("cpu",))
    moved = text_file.rename(text_file.with_name("moved.jsonl"))
    with pytest.raises(ValueError, match=r"calibration text is 'text.jsonl' there and 'moved.jsonl' here"):
        compare(experiment(calibration=Calibration(str(moved), 2, 32)), out, ("cpu",))
    other = random_model("llama", seed=1)
    shutil.rmtree(experiment().model)
    other.save_pretrained(experiment().model)
    tokenizer().save_pretrained(experiment().model)
    moved.rename(text_file)
    with pytest.raises(ValueError, match="model_sha256"):
        compare(experiment(), out, ("cpu",))
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.tex").write_text("")
    with pytest.raises(ValueError, match=r"holds 'thesis.tex' and no comparison.json"):
        compare(experiment(), tmp_path / "full", ("cpu",))


def test_a_cell_that_fails_leaves_the_others(experiment, tmp_path, monkeypatch):
    from rosaq.comparison import worker

    def failing(source, place, recipe, *rest):
        if (recipe.name, recipe.bits) == ("rtn", 3):
            raise RuntimeError("out of memory\nmore")
        return quantize(source, place, recipe, *rest)

    monkeypatch.setattr(worker, "quantize", failing)
    with pytest.raises(ValueError, match=r"1 of 5 cells failed, the others are kept; rtn.int3.seed0: out of memory"):
        compare(experiment(), tmp_path / "out", ("cpu",))
    assert len(list((tmp_path / "out" / "cells").glob("*.json"))) == 4
    monkeypatch.undo()
    assert len(compare(experiment(), tmp_path / "out", ("cpu",))) == 5


def test_bad_experiments(experiment, tmp_path):
    for changes, words in (
        ({"bits": (4, 4)}, "bits: 4 is given twice"),
        ({"recipes": ()}, "recipes: none is given"),
        ({"tasks": ("wikitext2", "glue")}, "task 'glue'; allowed are wikitext2, csr, mmlu"),
        ({"task_seeds": (7,)}, "task seed 7 is not one of the seeds 0"),
    ):
        with pytest.raises(ValueError, match=words):
            experiment(**changes)
    with pytest.raises(ValueError, match="salient is 48"):
        compare(experiment(recipes=(load_recipe("mixed").replace(salient=48, salient_per_head=4),)), tmp_path / "out", ("cpu",))
    with pytest.raises(ValueError, match=r"wiki.test.raw: no such file"):
        compare(experiment(data=tmp_path), tmp_path / "out", ("cpu",))


def test_the_fingerprint_tells_models_apart(saved):
    one = open_source(str(saved("llama")))
    assert fingerprint(one) == fingerprint(open_source(one.name))
    tensors = {name: one.tensors[name].clone() for name in one.tensors}
    tensors["model.layers.1.mlp.up_proj.weight"] += 1e-3
    assert fingerprint(one) != fingerprint(type(one)(one.name, one.config, one.architecture, tensors, one.dtype))


def test_published_figures_only_for_the_papers_models(experiment, saved, tmp_path):
    from transformers import LlamaConfig

    tiny = open_source(str(saved("llama"))).architecture
    with pytest.raises(ValueError, match="published figures are Llama-2-7B's: hidden 4096, but the model's is 48"):
        published("llama-2-7b", tiny)
    with pytest.raises(ValueError, match="the paper has llama-2-7b, llama-3-8b, qwen2-7b"):
        published("llama-2-70b", tiny)
    config = LlamaConfig(hidden_size=4096, intermediate_size=11008, num_hidden_layers=32, num_attention_heads=32, vocab_size=32000)
    paper = published("llama-2-7b", Architecture.of(config))
    assert ("ROSAQ", 3, 6.08) in paper.rows and ("FP16", 16, 5.47) in paper.rows
    table = make_table("a table", compare(experiment(), tmp_path / "out", ("cpu",)), paper)
    assert [row.method for row in table.rows if row.bits == 16] == ["original", "FP16"]
    assert "| INT3 | ROSAQ (published) |  | 6.08 |" in table.markdown() and "not measured here" in table.markdown()
    assert '<tr class="published">' in table.html() and ",arXiv:2506.13472," in table.csv()


def test_zero_shot_tasks_for_the_first_seed_and_added_later(experiment, saved, tmp_path, shared):
    pytest.importorskip("lm_eval")
    saved("llama", max_position_embeddings=2048)  # in the place of the experiment's: an answer has more than 128 letters
    one = {"recipes": (sized(load_recipe("rtn"), 16),), "bits": (4,), "seeds": (0, 1), "data": shared / "data", "windows": 2, "documents": 1}
    first = compare(experiment(**one), tmp_path / "out", ("cpu",))
    both = compare(experiment(**one, tasks=("wikitext2", "csr")), tmp_path / "out", ("cpu",))
    assert [sorted(values["figures"]) for _, values in both] == [["csr", "wikitext2"], ["csr", "wikitext2"], ["wikitext2"]]
    assert [len(values["runs"]) for _, values in both] == [2, 2, 1]  # the first figures are kept
    assert [values["figures"]["wikitext2"] for _, values in both] == [values["figures"]["wikitext2"] for _, values in first]
    table = table_of(both)
    assert table.columns == ["bits/weight", "WikiText-2 PPL", "PIQA", "WinoGrande", "HellaSwag", "ARC-e", "ARC-c", "CSQA", "OBQA", "average"]
    scores = both[1][1]["figures"]["csr"]["tasks"]
    shown = [table.rows[1].figures[column].value for column in table.columns[2:]]
    assert shown[:-1] == [100 * score["accuracy"] for score in scores.values()] and shown[-1] == pytest.approx(sum(shown[:-1]) / 7)
    assert "Zero-shot: acc for WinoGrande and CSQA" in table.markdown()


def test_the_console_has_80_columns(monkeypatch, capsys):
    from rosaq_cli import screen

    averages = {"accuracy": 0.25, "standard_error": 0.01, "questions": 10}
    scores = {name: averages for name in ("piqa", "winogrande", "hellaswag", "arc_easy", "arc_challenge", "commonsense_qa", "openbookqa")}
    figures = {
        "wikitext2": {"perplexity": 12.345, "standard_error": 0.1, "windows": 3, "window_tokens": 32},
        "csr": {"tasks": scores, "averages": {"csr": averages}},
        "mmlu": {"tasks": {}, "averages": {name: averages for name in ("mmlu", "mmlu_humanities", "mmlu_stem", "mmlu_other")}},
    }
    recipe, calibration = load_recipe("rosaq-heads-concatenated"), {"samples": 2, "seq_len": 32, "text": "pile"}
    cells = [
        (Cell(recipe, seed, ("wikitext2", "csr", "mmlu")), {"bits_per_weight": 4.25, "figures": figures, "calibration": calibration})
        for seed in (0, 1)
    ]
    table = make_table("a table", cells)
    assert len(table.head()) == 16
    monkeypatch.setattr(screen, "results", Console(width=80))
    screen.show_table(table.title, *table.console())
    shown = capsys.readouterr().out
    assert max(map(len, shown.splitlines())) <= 80
    row = next(line for line in shown.splitlines() if "INT4" in line)
    assert [text.strip() for text in row.strip("│").split("│")] == ["INT4", recipe.name, "4.250", "12.35 ± 0.00", "25.00", "25.00"]


def test_mmlu_columns():
    average = {"accuracy": 0.25, "standard_error": 0.01, "questions": 10}
    names = ("mmlu", "mmlu_humanities", "mmlu_social_sciences", "mmlu_stem", "mmlu_other")
    results = {"mmlu": {"tasks": {"mmlu_anatomy": average}, "averages": {name: average for name in names}}}
    found = task_figures(results)
    assert [column for column, _, _ in found] == ["MMLU humanities", "MMLU social", "MMLU STEM", "MMLU other", "MMLU average"]
    assert found[0][1:] == (25, 1)
