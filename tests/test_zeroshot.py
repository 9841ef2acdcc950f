"""Zero-shot accuracy: a model that must be right is, labels matter, and the harness's own wrapper says the same."""

import json
import math
import statistics
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from conftest import SIZES, random_model, tokenizer
from rosaq.clock import no_progress
from rosaq.evaluation.tasks import CSR, MMLU, MMLU_CATEGORIES, TASKS, HarnessTasks, chosen_tasks
from rosaq.evaluation.zeroshot import Suite, check_zero_shot, zero_shot
from test_cli import run

lm_eval = pytest.importorskip("lm_eval")
SUBJECTS = sorted(path.stem.removeprefix("mmlu_") for path in (Path(lm_eval.__file__).parent / "tasks" / "mmlu" / "default").glob("mmlu_*.yaml"))
LETTERS = "ABCDE"


def row(task, index, right):
    """A question whose right answer, at position `right`, ends with z, or is after z; letters are always A."""
    answers = ["az" if place == right else "aq" for place in range(2 if task == "piqa" else 4)]
    lettered = {"text": answers, "label": list(LETTERS[: len(answers)])}
    return {
        "piqa": lambda: {"goal": f"go {index}", "sol1": answers[0], "sol2": answers[1], "label": right % 2},
        "winogrande": lambda: {
            "sentence": f"it was {index} _ who ran.",
            "option1": "qz"[right == 0],
            "option2": "qz"[right == 1],
            "answer": str(right + 1),
        },
        "hellaswag": lambda: {"activity_label": "Doing", "ctx_a": "One.", "ctx_b": "two", "endings": answers, "label": str(right)},
        "commonsense_qa": lambda: {"question": f"what {index}?", "choices": {"text": list("vwxyu"), "label": list(LETTERS)}, "answerKey": "A"},
        "openbookqa": lambda: {"question_stem": f"so {index}", "choices": lettered, "answerKey": LETTERS[right]},
        "mmlu": lambda: {"question": f"what {index}?", "subject": SUBJECTS[index % 57], "choices": list("vwxy"), "answer": 0},
    }.get(task, lambda: {"question": f"what {index}?", "choices": lettered, "answerKey": LETTERS[right]})()


@pytest.fixture
def data(tmp_path):
    """A folder with a few rows of every task; two of each subject of MMLU."""
    folder = tmp_path / "data"
    folder.mkdir()
    for task in (*CSR, MMLU):
        count, answers = (114, 4) if task is MMLU else (6, 2 if task.name in ("piqa", "winogrande") else 4)
        write(folder / task.file, [row(task.name, index, index % answers) for index in range(count)])
    return folder


def write(file, rows):
    file.write_text("".join(json.dumps(entry) + "\n" for entry in rows))


def read(file):
    return [json.loads(line) for line in file.read_text().splitlines()]


def bigram_model(preferred):
    """A model whose logit of token b after token a is preferred[a, b], whatever came before."""
    vocabulary = SIZES["vocab_size"]
    sizes = {**SIZES, "hidden_size": 112, "max_position_embeddings": 1024, "tie_word_embeddings": False}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", **sizes)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.fill_(1.0 if "norm" in name else 0.0)
        model.model.embed_tokens.weight[:, :vocabulary] = torch.eye(vocabulary)
        model.lm_head.weight[:, :vocabulary] = preferred.T / math.sqrt(112)
    return model


@pytest.fixture(scope="module")
def knowing():
    """It likes z at any place, A after a blank, and a blank after z: the right answers of `row`."""
    ids = {letter: tokenizer()(letter).input_ids[0] for letter in "zA "}
    preferred = torch.zeros(SIZES["vocab_size"], SIZES["vocab_size"])
    preferred[:, ids["z"]] = 4.0
    preferred[ids[" "], ids["A"]] = 8.0
    preferred[ids["z"], ids[" "]] = 8.0
    return bigram_model(preferred)


def test_a_model_that_knows_is_right(knowing, data):
    result = zero_shot(knowing, tokenizer(), data=data)
    assert set(result.tasks) == {task.name for task in CSR} | {f"mmlu_{subject}" for subject in SUBJECTS} and len(SUBJECTS) == 57
    assert {score.accuracy for score in result.tasks.values()} == {1.0} == {average.accuracy for average in result.averages.values()}
    assert set(result.averages) == {"csr", "mmlu", *MMLU_CATEGORIES}
    assert result.tasks["piqa"].questions == 6 and result.averages["csr"].questions == 42 and result.averages["mmlu"].questions == 114
    assert {name: score.acc_norm is None for name, score in result.tasks.items() if name in TASKS} == {
        task.name: task.metric == "acc" for task in CSR
    }
    assert json.loads(json.dumps(result.to_dict()))["tasks"]["hellaswag"]["accuracy"] == 1.0


def test_labels_matter(knowing, data):
    wrong = {"piqa": ("label", 1), "winogrande": ("answer", "2"), "hellaswag": ("label", "3"), "arc_easy": ("answerKey", "D"), "mmlu": ("answer", 2)}
    for name, (field, value) in wrong.items():
        write(data / TASKS[name].file, [{**entry, field: value} for entry in read(data / TASKS[name].file)])
    result = zero_shot(knowing, tokenizer(), ("piqa", "winogrande", "hellaswag", "arc_easy", "openbookqa", "mmlu"), data)
    found = {name: score.accuracy for name, score in result.tasks.items() if name in TASKS}
    assert found == pytest.approx({"piqa": 3 / 6, "winogrande": 3 / 6, "hellaswag": 1 / 6, "arc_easy": 1 / 6, "openbookqa": 1.0})
    assert result.averages["mmlu"].accuracy == 0 and "csr" not in result.averages


def test_averages_and_standard_errors(knowing, data):
    rows = read(data / MMLU.file)  # anatomy (stem): two right and six wrong; all other subjects two right
    write(data / MMLU.file, rows + [{**rows[SUBJECTS.index("anatomy")], "answer": 1}] * 6)
    piqa = read(data / "piqa_validation.jsonl")
    write(data / "piqa_validation.jsonl", [{**entry, "label": 0} for entry in piqa])
    result = zero_shot(knowing, tokenizer(), data=data)
    stem, anatomy, total = result.averages["mmlu_stem"], result.tasks["mmlu_anatomy"], result.averages["mmlu"]
    assert (anatomy.questions, anatomy.acc) == (8, 0.25) and anatomy.acc_stderr == pytest.approx(statistics.stdev([1, 1] + [0] * 6) / math.sqrt(8))
    assert stem.accuracy == pytest.approx(1 - 6 / stem.questions) and total.accuracy == pytest.approx(114 / 120)  # over questions
    error = result.tasks["piqa"].acc_norm_stderr
    assert error == pytest.approx(statistics.stdev([1, 0] * 3) / math.sqrt(6))
    assert result.averages["csr"].accuracy == pytest.approx((0.5 + 6) / 7) and result.averages["csr"].standard_error == pytest.approx(error / 7)


@pytest.mark.parametrize("context", [48, 1024])  # the shorter one cuts questions from the left
def test_the_same_as_the_harness_with_its_own_wrapper(context, data):
    from lm_eval.evaluator import evaluate
    from lm_eval.models.huggingface import HFLM

    from rosaq.evaluation.likelihood import LikelihoodModel

    model, answers = random_model("llama", max_position_embeddings=context), []
    tasks = HarnessTasks(chosen_tasks(["piqa", "winogrande", "arc_easy", "commonsense_qa", "mmlu"]), data)

    class Kept:
        def loglikelihood(self, requests, disable_tqdm=False):
            answers.append(super().loglikelihood(requests))
            return answers[-1]

    class Ours(Kept, LikelihoodModel):
        pass

    class Theirs(Kept, HFLM):
        pass

    for harness in (Ours(model, tokenizer(), 300, no_progress), Theirs(pretrained=model, tokenizer=tokenizer(), batch_size=7)):
        evaluate(harness, tasks.loaded, limit=3, log_samples=False)
    (ours, theirs) = answers
    assert len(ours) == len(theirs) == 3 * (2 + 2 + 4 + 5) + 114 * 4
    assert [greedy for _, greedy in ours] == [greedy for _, greedy in theirs]
    assert [chance for chance, _ in ours] == pytest.approx([chance for chance, _ in theirs], abs=2e-4, rel=1e-5)


def test_a_suite_reads_and_tokenizes_once_for_all_models(knowing, data, monkeypatch):
    words, calls = tokenizer(), []
    real = type(words).__call__
    monkeypatch.setattr(type(words), "__call__", lambda self, text, **options: calls.append(text) or real(self, text, **options))
    suite, other = Suite(("csr", "mmlu"), words, data), bigram_model(torch.zeros(SIZES["vocab_size"], SIZES["vocab_size"]))
    first, indifferent, second = suite.run(knowing, limit=3), suite.run(other, limit=3), suite.run(knowing, limit=3)
    assert len([text for text in calls if isinstance(text, list)]) == 1 and max(map(len, calls)) > 100
    assert first == second == zero_shot(knowing, tokenizer(), ("csr", "mmlu"), data, limit=3)
    assert indifferent == zero_shot(other, tokenizer(), ("csr", "mmlu"), data, limit=3) and indifferent != first


def test_limit(knowing, data):
    result = zero_shot(knowing, tokenizer(), ("arc_challenge", "mmlu"), data, limit=1)
    assert {score.questions for score in result.tasks.values()} == {1} and result.limit == 1
    assert math.isnan(result.tasks["arc_challenge"].standard_error) and math.isnan(result.averages["mmlu"].standard_error)
    with pytest.raises(ValueError, match="limit is 0; it must be at least 1"):
        zero_shot(knowing, tokenizer(), ("piqa",), data, limit=0)


def test_data_that_is_not_as_it_should_be(knowing, data, monkeypatch):
    def refused(name, message):
        with pytest.raises(ValueError, match=message):
            zero_shot(knowing, tokenizer(), (name,), data)

    file = data / "piqa_validation.jsonl"
    write(file, [row("piqa", 0, 0), {"goal": "x", "sol1": "a", "label": 0}])
    refused("piqa", r"piqa_validation.jsonl, line 2: no field 'sol2'; piqa needs goal, sol1, sol2, label")
    file.write_text("{")
    refused("piqa", r"piqa_validation.jsonl, line 1: not valid JSON")
    file.write_text("\n")
    refused("piqa", r"piqa_validation.jsonl: holds no questions")
    file.unlink()
    refused("csr", r"piqa_validation.jsonl: no such file; --data is a folder that holds piqa_validation.jsonl for piqa")
    write(data / "arc_easy_test.jsonl", [{**row("arc_easy", 0, 0), "answerKey": "7"}])
    refused("arc_easy", r"arc_easy_test.jsonl: the harness cannot ask arc_easy by it")
    write(data / MMLU.file, [entry for entry in read(data / MMLU.file) if entry["subject"] != "virology"])
    refused("mmlu", r"mmlu_test.jsonl: holds no questions of the subject 'virology'")
    refused("boolq", r"zero-shot task 'boolq'; allowed are csr, piqa, winogrande")


def test_without_hub_or_harness(knowing, monkeypatch):
    import datasets

    def unreachable(*_, **__):
        raise ConnectionError("no route to host")

    monkeypatch.setattr(datasets, "load_dataset", unreachable)
    with pytest.raises(
        ValueError, match=r"the hub did not give piqa: .*no route to host; give --data DIR, a folder that holds piqa_validation.jsonl"
    ):
        zero_shot(knowing, tokenizer(), ("piqa",))
    monkeypatch.setitem(__import__("sys").modules, "lm_eval", None)
    with pytest.raises(ValueError, match=r"pip install 'rosaq\[eval\]'"):
        check_zero_shot(("piqa",), None)


def test_logits_that_are_not_numbers(data):
    model = random_model("llama")
    with torch.no_grad():
        model.lm_head.weight[5] = math.nan
    with pytest.raises(ValueError, match="NaN or Inf"):
        zero_shot(model, tokenizer(), ("piqa",), data)


def test_the_command_line(knowing, data, tmp_path, monkeypatch, capfd):
    knowing.save_pretrained(tmp_path / "model")
    tokenizer().save_pretrained(tmp_path / "model")
    (data / "wiki.test.raw").write_text("\n".join(["abz abz"] * 40))
    command = ("evaluate", tmp_path / "model", "--data", data, "--window", 32, "--every", 2)
    code, out, _ = run(monkeypatch, capfd, *command, "--tasks", "wikitext2,piqa,openbookqa", "--json")
    entry = json.loads(out)
    assert code == 0 and entry["texts"]["wikitext2"]["windows"] > 2 and entry["packed"] is False
    assert {name: score["accuracy"] for name, score in entry["zeroshot"]["tasks"].items()} == {"piqa": 1.0, "openbookqa": 1.0}
    code, out, err = run(monkeypatch, capfd, *command, "--tasks", "csr", "--limit", 3)
    assert code == 0 and "average of csr" in out and "100.00 ± 0.00" in out and "only a part was used" in err and "it/s" not in err


def test_real_data(knowing, shared):
    result = zero_shot(knowing, tokenizer(), data=shared / "data", limit=2)
    assert result.averages["csr"].questions == 14 and result.averages["mmlu"].questions == 114
    assert all(0 <= score.accuracy <= 1 for score in result.tasks.values())
