"""Bits against loss: targets, checkpoints and divergence in one table, its front, its picture."""

import importlib.util
import shutil
from pathlib import Path

import pytest

from rosaq import load_recipe
from rosaq.comparison import pareto
from rosaq.comparison.run import compare
from rosaq.comparison.table import Figure, Row, Table
from test_compare import data, experiment, table_of  # noqa: F401  (fixtures)

USELESS = ((16, "original", 22.0), (2, "rtn", 5e5), (2, "gptq", 4e5))


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


def test_methods_of_no_use_are_drawn_where_there_are_no_others():
    """Two rows far above three times the original's perplexity, alone and with a third that is not."""
    pytest.importorskip("matplotlib")
    original, *lost = (Row(bits, name, {"bits/weight": Figure(bits), "WikiText-2 PPL": Figure(value)}) for bits, name, value in USELESS)
    useful = Row(4, "awq", {"bits/weight": Figure(4.3), "WikiText-2 PPL": Figure(25.0)})
    for rows, names in ((lost, {"rtn", "gptq"}), ([*lost, useful], {"awq"})):
        (axis,) = pareto.plot(Table("some", ["bits/weight", "WikiText-2 PPL"], [original, *rows], [])).axes
        assert set(axis.get_legend_handles_labels()[1]) == {*names, "original, 22.00"}


def test_bits_that_are_printed_alike_are_equal():
    """Of two rows whose bits differ in the fifth digit, only the better one is of the front."""
    rows = [
        Row(0, name, {"bits/weight": Figure(bits), "WikiText-2 PPL": Figure(value)})
        for bits, name, value in ((3.89986, "worse", 25.7), (3.89988, "better", 24.1))
    ]
    assert [(point.row.method, point.front) for point in pareto.points(Table("some", [], rows, []))] == [("better", True), ("worse", False)]


def test_a_verdict_by_budget(tmp_path):
    """`scripts/pareto.py` on two tables: better by more than the spread, within it, worse, and where only one side is as small."""
    spec = importlib.util.spec_from_file_location("pareto_script", Path(__file__).parents[1] / "scripts" / "pareto.py")
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    head = "bits,method,published,bits/weight,WikiText-2 PPL,WikiText-2 PPL spread,WikiText-2 PPL seeds"
    own = ["FP16,original,,16,20,,1", "INT2-4,rosaq-int4-3.4,,3.4,30,1,2", "INT2-4,rosaq-distilled-4.3,,4.3,24,0.1,3", "INT4,awq,,4.312,25,0.2,3"]
    others = ["INT3,awq,,3.312,30.5,0.2,3", "INT4,awq,,4.312,1,,1", "INT4,quarot-gptq,,4.6,23.5,0.2,3", "INT4,gptq,paper,4.1,2,,1"]
    others.append("INT2,awq,,2.3,61,,1")  # more than three times the original's
    for name, rows in (("a.csv", own), ("b.csv", others)):
        (tmp_path / name).write_text("\n".join([head, *rows, ""]))
    pytest.importorskip("matplotlib")
    script.main(str(tmp_path / "out"), "two tables", str(tmp_path / "a.csv"), str(tmp_path / "b.csv"))
    everything, untrained = (tmp_path / "out.md").read_text().split("## By budget")[1:]
    said = {line.split(" |")[0]: line.split(" | ")[-1] for line in everything.splitlines()}
    assert said["| 3.35"] == "no, none of ours |" and said["| 3.4"] == "no, +0.50 is within the spread |"
    assert said["| 4.35"] == "yes, +1.00, 5 spreads |" and said["| 4.65"] == "no, -0.50, 2 spreads |" and "| 2.5" not in said
    assert "| 4.35 | rosaq-int4-3.4 |" in untrained and (tmp_path / "out.svg").stat().st_size > 1000
