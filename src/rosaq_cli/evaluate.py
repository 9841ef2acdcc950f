"""`rosaq evaluate`."""

from pathlib import Path
from typing import Annotated

import typer

from rosaq_cli.screen import errors, show_json, show_table, silence_transformers, stage_bars


def evaluate(
    model: Annotated[str, typer.Argument(help="rosaq checkpoint, Hugging Face folder, .gguf file or hub id.", show_default=False)],
    text: Annotated[Path | None, typer.Option(help="Text file to predict.", show_default=False)] = None,
    dataset: Annotated[str | None, typer.Option(help="wikitext2: its test split.", show_default="wikitext2")] = None,
    data: Annotated[Path | None, typer.Option(help="Folder with wiki.test.raw, instead of the hub.", show_default=False)] = None,
    against: Annotated[str | None, typer.Option(help="Original model: adds KL divergence and top-1 agreement.", show_default=False)] = None,
    window: Annotated[int, typer.Option(help="Tokens per window.")] = 2048,
    limit: Annotated[int | None, typer.Option(help="Use the first so many windows only.", show_default="all")] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")] = "auto",
    dtype: Annotated[str, typer.Option(help="auto (float32 on the CPU, as stored on a GPU), float32, float16, bfloat16.")] = "auto",
    json_output: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", help="No progress bars.")] = False,
) -> None:
    """Measure perplexity as GPTQ and AWQ report it, and divergence from the original.

    The whole text is tokenized at once and cut into windows that do not overlap; WikiText-2's lines are joined by two
    newlines; a last incomplete window is dropped.
    """
    from rosaq.engines.loading import load_model
    from rosaq.evaluation.perplexity import divergence, perplexity, read_text, read_wikitext2, text_windows

    silence_transformers()
    if text is not None and dataset is not None:
        raise ValueError("--text and --dataset exclude each other")
    if dataset not in (None, "wikitext2"):
        raise ValueError(f"dataset {dataset!r}; allowed is wikitext2, or give --text FILE")
    content = read_text(text) if text is not None else read_wikitext2(data)
    loaded, tokenizer = load_model(model, device, dtype)
    windows = text_windows(content, tokenizer, window)[:limit]
    with stage_bars(quiet or json_output) as progress:
        if against is None:
            result = perplexity(loaded, windows, progress).to_dict()
        else:
            reference, _ = load_model(against, device, dtype)
            result = divergence(loaded, reference, windows, progress).to_dict()
    name, kind = str(text or "wikitext2"), str(loaded.dtype).removeprefix("torch.")
    if json_output:
        show_json({"model": model, "against": against, "text": name, "device": str(loaded.device), "dtype": kind, "result": result})
        return
    figures = result
    if against is None:
        rows = [["perplexity", _with_error(figures)]]
    else:
        rows = [
            ["perplexity", _with_error(figures["model"])],
            ["perplexity of the original", _with_error(figures["reference"])],
            ["KL divergence", f"{figures['kl_divergence']:.5f} nats per token"],
            ["top-1 agreement", f"{100 * figures['top1_agreement']:.2f} %"],
        ]
    show_table(f"{model} on {name}: {len(windows)} windows of {windows.shape[1]} tokens, {kind}", ["", "measured"], rows)
    if limit is not None:
        errors.print(f"only the first {len(windows)} windows were used (--limit)", style="yellow")


def _with_error(figures: dict[str, float]) -> str:
    return f"{figures['perplexity']:.4f} ± {figures['standard_error']:.4f}"
