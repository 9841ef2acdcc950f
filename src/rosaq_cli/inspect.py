"""`rosaq inspect`."""

import statistics
from pathlib import Path
from typing import Annotated

import typer

from rosaq_cli.screen import results, show_json, show_table, silence_transformers, stage_bars


def inspect(
    model: Annotated[str, typer.Argument(help="Hub id, local Hugging Face folder, or .gguf file.", show_default=False)],
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for JSON, plots and one HTML page.", show_default=False)],
    checkpoint: Annotated[Path | None, typer.Option(help="rosaq checkpoint of the model: adds each layer's errors.", show_default="none")] = None,
    calibration: Annotated[str | None, typer.Option(help="As for quantize.", show_default="the checkpoint's, or pile")] = None,
    samples: Annotated[int, typer.Option(help="Calibration windows; a checkpoint's own calibration has its own.")] = 32,
    seq_len: Annotated[int, typer.Option(help="Tokens per window, likewise.")] = 512,
    seed: Annotated[int, typer.Option(help="Seed of the choice of text, likewise.")] = 0,
    salient: Annotated[int, typer.Option(help="Channels counted as leading.")] = 128,
    salient_per_head: Annotated[int, typer.Option(help="Channels of each head of o counted as leading.")] = 32,
    top: Annotated[int, typer.Option(help="Channels of the table.")] = 5,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")] = "auto",
    json_output: Annotated[bool, typer.Option("--json", help="Print the report as JSON.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", help="No progress bars.")] = False,
) -> None:
    """Look at activations before and after rotation, and at what a checkpoint loses in each layer.

    Writes the paper's Table 8 and Figure 2 for this model, the eigenvalues of every site, the share of energy in the
    leading channels, and with --checkpoint the relative errors of weights and outputs.
    """
    from rosaq import Calibration
    from rosaq.inspection.page import TABLE_HEAD, norm_spread, table8, write
    from rosaq.inspection.plots import require_matplotlib
    from rosaq.inspection.report import Settings
    from rosaq.inspection.report import inspect as run
    from rosaq.new_folders import check_writable

    silence_transformers()
    require_matplotlib()
    check_writable(output)
    chosen = None if calibration is None and checkpoint is not None else Calibration(calibration or "pile", samples, seq_len, seed)
    with stage_bars(quiet or json_output) as progress:
        report = run(model, chosen, Settings(salient, salient_per_head, top), checkpoint, device, progress)
    written = write(report, output)
    if json_output:
        show_json(report)
        return
    show_table(f"{model}: channels of largest magnitude, mean of attn_in and mlp_in sites", TABLE_HEAD, table8(report))
    rows = []
    for site in report["blocks"][0]:
        for basis in report["blocks"][0][site]["figures"]:
            found = [block[site]["figures"][basis] for block in report["blocks"]]
            rows.append([f"{site}, {basis}", *(f"{statistics.median(entry[name] for entry in found):.4g}" for name in found[0])])
    show_table("median over blocks", ["site, basis", "kurtosis", "max / median", "energy in the top"], rows)
    results.print(norm_spread(report), highlight=False, soft_wrap=True)
    if report["errors"]:
        roles = list(dict.fromkeys(error["role"] for error in report["errors"]))
        lines = [
            [role, *(f"{statistics.median(e[name] for e in report['errors'] if e['role'] == role):.4f}" for name in ("weight", "output"))]
            for role in roles
        ]
        show_table(f"{checkpoint}: relative errors, median over blocks", ["layer", "weight", "output"], lines)
    results.print(f"{written[-1]} and {len(written) - 1} other files", highlight=False, soft_wrap=True)
