"""`rosaq distill`."""

from pathlib import Path
from typing import Annotated

import typer

from rosaq_cli.screen import results, show_json, show_table, silence_transformers, stage_bars


def distill(
    checkpoint: Annotated[Path, typer.Argument(help="Folder of a rosaq checkpoint.", show_default=False)],
    model: Annotated[str, typer.Option(help="The original: hub id, local folder, or .gguf file.", show_default=False)],
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder to make; must be empty or not exist.", show_default=False)],
    calibration: Annotated[str, typer.Option(help="Text to train on, as for quantize.")] = "pile",
    samples: Annotated[int, typer.Option(help="Windows to train on; 8 more are held out.")] = 400,
    seq_len: Annotated[int, typer.Option(help="Tokens per window.")] = 2048,
    epochs: Annotated[int, typer.Option(help="Passes over all windows.")] = 1,
    learning_rates: Annotated[
        str,
        typer.Option(help="Of scales, salient weights (of a model up to 576 wide; less for wider ones), norms and codes; 0 leaves a part alone."),
    ] = "3e-3,1.5e-4,3e-3,0",
    seed: Annotated[int, typer.Option(help="Seed of the choice of text and of the order of windows.")] = 0,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")] = "auto",
    json_output: Annotated[bool, typer.Option("--json", help="Print the report as JSON.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", help="No progress bars and no table.")] = False,
) -> None:
    """Train what a checkpoint keeps precise against its original, for the same bits.

    Group scales, salient weights, norm weights and, with a learning rate, codes are trained on KL(original || checkpoint);
    the format stays as it is. The original and the checkpoint are loaded whole.
    """
    from rosaq import Calibration
    from rosaq.distillation import Settings
    from rosaq.distillation import distill as run

    silence_transformers()
    settings = Settings(epochs, learning_rates=_rates(learning_rates))
    with stage_bars(quiet or json_output) as progress:
        report = run(checkpoint, model, output, Calibration(calibration, samples, seq_len, seed), settings, device, progress)
    if json_output:
        show_json(vars(report))
    elif not quiet:
        rows = [
            [name, *(f"{found[key]:.4f}" for found in (report.before, report.after))]
            for name, key in (("KL divergence", "kl_divergence"), ("top-1 agreement", "top1_agreement"))
        ]
        rows.append(["perplexity", *(f"{found['model']['perplexity']:.3f}" for found in (report.before, report.after))])
        show_table(f"{output}, on {settings.held_out} windows held out", ["", "before", "after"], rows)
        kept = "" if report.share == 1 else f"; the divergence had risen at their end, so {report.share:g} of the way is kept"
        results.print(f"{len(report.losses)} steps; training took {report.seconds['training']:.1f} s{kept}", highlight=False, soft_wrap=True)


def _rates(text: str) -> tuple[float, float, float, float]:
    try:
        scales, salient, norms, codes = (float(part) for part in text.split(","))
    except ValueError as error:
        raise ValueError(f"--learning-rates is {text!r}; it takes four numbers separated by commas, such as 3e-3,1.5e-4,3e-3,0") from error
    return scales, salient, norms, codes
