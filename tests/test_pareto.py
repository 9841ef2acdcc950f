"""Bits against loss: targets, checkpoints and divergence in one table, its front, its picture."""

import shutil

import pytest

from rosaq import load_recipe
from rosaq.comparison import pareto
from rosaq.comparison.run import compare
from test_compare import data, experiment, table_of  # noqa: F401  (fixtures)


def test_bits_against_loss(experiment, tmp_path):  # noqa: F811  (a fixture)
    """Targets, a checkpoint that is there, and divergence in one table; the rows by bits, the front among them."""
    target = load_recipe("rtn").replace(name="rtn-3.9", target_bits=3.9, group_size=32)
    made = compare(experiment(recipes=(target,)), tmp_path / "made", ("cpu",), keep=True)
    assert [cell.name for cell, _ in made] == ["original", "rtn-3.9.target.seed0"]
    folder = tmp_path / "mine-seed7"
    shutil.move(tmp_path / "made" / "checkpoints" / made[1][0].name, folder)
    measured = compare(experiment(recipes=(*experiment().recipes, target), divergence=True, checkpoints=(folder,)), tmp_path / "out", ("cpu",))
    assert measured[-1][0].name == "checkpoint.mine-seed7" and measured[-1][1]["figures"] == measured[-2][1]["figures"]
    assert "kl_divergence" not in measured[0][1]["figures"]["wikitext2"] and 3.5 < measured[-1][1]["bits_per_weight"] <= 3.9
    table = table_of(measured)
    assert [(row.section, row.method) for row in table.rows if row.bits == 0] == [("INT2-4", "rtn-3.9"), ("INT2-4", "mine")]
    found = pareto.points(table)
    assert [point.bits for point in found] == sorted(point.bits for point in found) and len(found) == 6
    best = [min(each.perplexity.value for each in found if each.bits <= point.bits) for point in found]
    assert all(point.front == (point.perplexity.value == least) for point, least in zip(found, best, strict=True) if point.row.method != "mine")
    lines = pareto.markdown(table).splitlines()
    assert lines[2] == "| method | bits/weight | WikiText-2 PPL | KL | seeds |" and lines[4].startswith("| **")
    assert all(line.endswith("| 1 |") for line in lines[4:10]) and lines[10].startswith("| original | 16.000")
    pytest.importorskip("matplotlib")
    figure = pareto.plot(table)
    figure.savefig(tmp_path / "plot.svg")
    assert [axis.get_ylabel() for axis in figure.axes] == [pareto.PANELS["WikiText-2 PPL"], pareto.PANELS["KL"]]
    assert {"rtn", "rtn, targets", "rosaq-paper", "mine"} <= set(figure.axes[0].get_legend_handles_labels()[1])
    with pytest.raises(ValueError, match="not the folder of a rosaq checkpoint"):
        experiment(checkpoints=(tmp_path,)).cells()
