"""The folder of a comparison, whatever stands in it."""

import json
from dataclasses import replace

import pytest

from rosaq import Calibration, load_recipe, open_source, quantize
from rosaq.comparison.experiment import Experiment, sized
from rosaq.comparison.results import Results
from rosaq.comparison.run import compare
from rosaq.comparison.table import make_table

SCORE = {"accuracy": 0.5, "standard_error": 0.1, "metric": "acc"}
TASKS = {"csr": {"tasks": {"piqa": SCORE}, "averages": {"csr": SCORE}}, "mmlu": {"tasks": {}, "averages": {"mmlu": SCORE}}}


def places(values, path=()):
    """Every place in a JSON object, as the keys that lead there."""
    for key, value in values.items():
        yield *path, key
        if isinstance(value, dict):
            yield from places(value, (*path, key))


def changed(values, path, wrong):
    """A copy with something else in one place; "absent": without it."""
    copy = json.loads(json.dumps(values))
    inner = copy
    for key in path[:-1]:
        inner = inner[key]
    inner[path[-1]] = wrong
    if wrong == "absent":
        del inner[path[-1]]
    return copy


@pytest.fixture
def experiment(saved, text_file, tmp_path):
    (tmp_path / "wiki.test.raw").write_text(text_file.read_text()[:500])
    recipe = sized(load_recipe("rosaq-paper"), 16, 16, 4)
    return Experiment(str(saved("llama")), (recipe,), (4,), calibration=Calibration(str(text_file), 2, 32), data=tmp_path, window=32)


def test_a_cell_with_wrong_values_is_named(experiment, tmp_path):
    """Whatever is put in any place of a cell's file: a table, or one sentence that names the file; never a traceback."""
    compare(experiment, tmp_path / "out", ("cpu",))
    file, refused = tmp_path / "out" / "cells" / "rosaq-paper.int4.seed0.json", 0
    values = json.loads(file.read_text())
    values["figures"] |= TASKS
    results = Results(tmp_path / "out", experiment, open_source(experiment.model))
    for path in places(values):
        for wrong in ("four", 3, -1.5, None, [], {}, "absent"):
            file.write_text(json.dumps(changed(values, path, wrong)))
            try:
                table = make_table("a table", [(cell, results.read(cell)) for cell in experiment.cells()])
                assert table.markdown() and table.csv() and table.html() and table.console()
            except ValueError as error:
                assert str(error).startswith(f"{file}: ") and "\n" not in str(error), (path, wrong)
                refused += 1
    assert refused > 150


@pytest.mark.parametrize(
    ("path", "wrong", "words"),
    [
        (("figures", "wikitext2", "perplexity"), "low", "perplexity is 'low', which no cell has there; remove the file"),
        (("figures", "wikitext2", "windows"), "absent", "wikitext2 lacks 'windows'; remove the file"),
        (("figures",), [], r"figures is \[\], which no cell has there"),
        (("recipe", "bits"), "4", "recipe 'rosaq-paper': bits is '4'; it must be of type int"),
        (("recipe",), None, "recipe is None, which no cell has there"),
    ],
)
def test_a_comparison_does_not_go_on_from_a_damaged_cell(path, wrong, words, experiment, tmp_path):
    compare(experiment, tmp_path / "out", ("cpu",))
    file = tmp_path / "out" / "cells" / "rosaq-paper.int4.seed0.json"
    file.write_text(json.dumps(changed(json.loads(file.read_text()), path, wrong)))
    with pytest.raises(ValueError, match=rf"seed0.json: {words}"):
        compare(experiment, tmp_path / "out", ("cpu",))


@pytest.mark.parametrize(
    ("path", "value", "words"),
    [
        (("recipe",), "absent", "quantization_config: the key 'recipe' is missing"),
        (("recipe",), None, "quantization_config: recipe is None; it must be an object"),
        (("recipe", "bits"), 5, r"quantization_config.recipe: recipe 'rtn': bits is 5; allowed are \(2, 3, 4\)"),
        (("format_version",), 99, "quantization_config: checkpoint format 99; this rosaq reads format"),
    ],
)
def test_a_damaged_checkpoint_is_refused_before_anything_is_measured(path, value, words, experiment, text_file, tmp_path):
    recipe, folder = sized(load_recipe("rtn"), 16), tmp_path / "ck"
    quantize(experiment.model, folder, recipe, Calibration(str(text_file), 2, 32), "cpu")
    wanted = replace(experiment, checkpoints=(folder,))
    assert wanted.cells()[-1].recipe == recipe
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(changed(config, ("quantization_config", *path), value)))
    with pytest.raises(ValueError, match=rf"ck/config.json: {words}"):
        wanted.cells()
