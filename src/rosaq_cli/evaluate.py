"""`rosaq evaluate`."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from rosaq_cli.screen import errors, show_json, show_table, silence_transformers, stage_bars

if TYPE_CHECKING:  # loading these takes seconds, which `rosaq --help` must not
    from rosaq.evaluation.zeroshot import ZeroShotResult

WIKITEXT2 = "wikitext2"


def evaluate(
    model: Annotated[str, typer.Argument(help="rosaq checkpoint, Hugging Face folder, .gguf file or hub id.", show_default=False)],
    tasks: Annotated[
        str | None,
        typer.Option(help="Separated by commas: wikitext2, csr, mmlu, a single task of csr such as piqa, or a text file.", show_default=WIKITEXT2),
    ] = None,
    text: Annotated[Path | None, typer.Option(help="Text file to predict, as one more task.", show_default="none")] = None,
    data: Annotated[Path | None, typer.Option(help="Folder of wiki.test.raw and the tasks' .jsonl files.", show_default="the hub")] = None,
    against: Annotated[str | None, typer.Option(help="Original model: adds KL divergence and top-1 agreement.", show_default="none")] = None,
    window: Annotated[int, typer.Option(help="Tokens per window of a text.")] = 2048,
    every: Annotated[int, typer.Option(help="Use every so many-th window of a text only.")] = 1,
    limit: Annotated[int | None, typer.Option(help="Use the first so many windows, and questions of each task.", show_default="all")] = None,
    weights: Annotated[str, typer.Option(help="packed: as stored. dense: as plain layers, faster. auto: dense where twice that fits.")] = "auto",
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")] = "auto",
    dtype: Annotated[str, typer.Option(help="auto (float32 on the CPU, as stored on a GPU), float32, float16, bfloat16.")] = "auto",
    json_output: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", help="No progress bars.")] = False,
) -> None:
    """Measure perplexity, divergence from the original, and zero-shot accuracy.

    Perplexity as GPTQ and AWQ report it: the whole text is tokenized at once and cut into windows that do not overlap;
    WikiText-2's lines are joined by two newlines; a last incomplete window is dropped. The error comes from their spread.

    Zero-shot by lm-evaluation-harness (the extra "eval"): csr is PIQA, WinoGrande, HellaSwag, ARC-easy,
    ARC-challenge, CommonsenseQA and OpenbookQA with their average, mmlu its 57 subjects and four categories.
    """
    from rosaq.engines.dense import is_packed
    from rosaq.engines.loading import load_model
    from rosaq.evaluation.perplexity import divergence, perplexity, text_windows
    from rosaq.evaluation.zeroshot import check_zero_shot, zero_shot

    silence_transformers()
    texts, questions = _chosen(tasks, text)
    check_counts({"--limit": limit, "--every": every, "--window": window})
    if against is not None and not texts:
        raise ValueError("--against compares what two models predict of a text; add wikitext2 or a text file to --tasks")
    if questions:
        check_zero_shot(questions, data)  # before a model is loaded
    _check_configs(model, against)  # before a text is fetched
    contents = {name: _read(name, data) for name in texts}
    loaded, tokenizer = load_model(model, device, dtype, weights=weights)
    windows = {name: text_windows(content, tokenizer, window)[::every][:limit] for name, content in contents.items()}
    reference = load_model(against, device, dtype, weights=weights)[0] if against is not None else None
    with stage_bars(quiet or json_output) as progress:
        found = {
            name: (perplexity(loaded, rows, progress) if reference is None else divergence(loaded, reference, rows, progress)).to_dict()
            for name, rows in windows.items()
        }
        answered = zero_shot(loaded, tokenizer, questions, data, limit, progress=progress) if questions else None
    kind = str(loaded.dtype).removeprefix("torch.")
    if json_output:
        entry = {"model": model, "against": against, "device": str(loaded.device), "dtype": kind, "packed": is_packed(loaded)}
        show_json({**entry, "every": every, "texts": found, "zeroshot": answered and answered.to_dict()})
        return
    for name, figures in found.items():
        _show_text(f"{model} on {name}: {len(windows[name])} windows of {window} tokens, {kind}", figures, against is not None)
    if answered is not None:
        _show_zero_shot(f"{model}, zero-shot, {kind}", answered)
    if limit is not None or every > 1:
        errors.print("only a part was used (--limit, --every)", style="yellow")


def _chosen(tasks: str | None, text: Path | None) -> tuple[list[str], list[str]]:
    """Texts (wikitext2, or a file's path) and zero-shot tasks that the options name."""
    from rosaq.evaluation.tasks import NAMES

    names = [name.strip() for name in tasks.split(",")] if tasks is not None else [] if text is not None else [WIKITEXT2]
    texts = [] if text is None else [str(text)]
    questions = []
    for name in names:
        if name in NAMES:
            questions.append(name)
        elif name == WIKITEXT2 or Path(name).is_file():
            texts.append(name)
        else:
            raise ValueError(f"task {name!r}: no text file, and not one of {', '.join((WIKITEXT2, *NAMES))}")
    return texts, questions


def _check_configs(*models: str | None) -> None:
    from rosaq.checkpoint import is_checkpoint
    from rosaq.engines.transformers import RosaqConfig

    for model in models:
        if model is not None and is_checkpoint(model):
            RosaqConfig.of(model)


def check_counts(options: dict[str, int | None]) -> None:
    """Refuse a count below 1.

    Raises:
        ValueError: names the option.
    """
    for name, value in options.items():
        if value is not None and value < 1:
            raise ValueError(f"{name} is {value}; it must be at least 1")


def _read(name: str, data: Path | None) -> str:
    from rosaq.evaluation.perplexity import read_wikitext2
    from rosaq.text_files import read_text

    return read_wikitext2(data) if name == WIKITEXT2 else read_text(Path(name))


def _show_text(title: str, figures: dict[str, Any], compared: bool) -> None:
    rows = [["perplexity", _with_error(figures["model"] if compared else figures)]]
    if compared:
        rows += [
            ["perplexity of the original", _with_error(figures["reference"])],
            ["KL divergence", f"{figures['kl_divergence']:.5f} nats per token"],
            ["top-1 agreement", f"{100 * figures['top1_agreement']:.2f} %"],
        ]
    show_table(title, ["", "measured"], rows)


def _with_error(figures: dict[str, float]) -> str:
    return f"{figures['perplexity']:.4f} ± {figures['standard_error']:.4f}"


def _show_zero_shot(title: str, result: "ZeroShotResult") -> None:
    """One row a task (MMLU's subjects are in the JSON only), then the averages; the accuracy that counts comes first."""

    def percent(value: float, error: float) -> str:
        return f"{100 * value:.2f} ± {100 * error:.2f}"

    rows = []
    for name, score in result.tasks.items():
        if not name.startswith("mmlu_"):
            counted, plain = percent(score.accuracy, score.standard_error), percent(score.acc, score.acc_stderr)
            rows.append([name, counted, score.metric, plain, str(score.questions)])
    for name, average in result.averages.items():
        label = "average of csr" if name == "csr" else name
        rows.append([label, percent(average.accuracy, average.standard_error), "", "", str(average.questions)])
    show_table(title, ["", "accuracy, %", "by", "acc, %", "questions"], rows)
