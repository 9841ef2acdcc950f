"""`rosaq quantize`."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from rosaq_cli.plan import PLACES, show_plan, size_rows
from rosaq_cli.recipes import complete_recipe
from rosaq_cli.screen import show_json, show_table, stage_bars

if TYPE_CHECKING:  # loading it takes seconds, which `rosaq --help` must not
    from rosaq.run import Report


def quantize(
    model: Annotated[str, typer.Argument(help="Hub id, local Hugging Face folder, or .gguf file.", show_default=False)],
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Folder to make; must be empty or not exist.", show_default="required unless --plan")
    ] = None,
    recipe: Annotated[
        str, typer.Option(help="Shipped recipe ('rosaq recipes' lists them) or a .toml file.", autocompletion=complete_recipe)
    ] = "rosaq-int4",
    bits: Annotated[int | None, typer.Option(help="Bits of a quantized weight: 2, 3 or 4.", show_default="recipe's")] = None,
    group_size: Annotated[int | None, typer.Option(help="Channels that share a scale: 32, 64 or 128.", show_default="recipe's")] = None,
    salient: Annotated[int | None, typer.Option(help="Channels of q, k, v, gate, up that stay precise.", show_default="recipe's")] = None,
    salient_per_head: Annotated[int | None, typer.Option(help="Channels of each head of o that stay precise.", show_default="recipe's")] = None,
    salient_down: Annotated[int | None, typer.Option(help="Channels of down that stay precise.", show_default="recipe's")] = None,
    target_bits: Annotated[
        float | None, typer.Option(help="Bits per weight to stay under, all that is stored counted: each layer gets 2, 3 or 4.", show_default="none")
    ] = None,
    calibration: Annotated[str, typer.Option(help="pile, c4, wikitext2 (hub), self (sampled from the model), or a .txt/.jsonl file.")] = "pile",
    samples: Annotated[int, typer.Option(help="Calibration windows.")] = 128,
    seq_len: Annotated[int, typer.Option(help="Tokens per calibration window.")] = 2048,
    seed: Annotated[int, typer.Option(help="Seed of the choice of calibration text.")] = 0,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")] = "auto",
    max_memory: Annotated[
        str | None, typer.Option(help="Host memory to stay under, such as 8GiB: activations go to disk where needed.", show_default="what is free")
    ] = None,
    max_device_memory: Annotated[
        str | None, typer.Option(help="Memory of a GPU to stay under; activations go to the host where needed.", show_default="what is free")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Start over instead of going on where an earlier run with this output ended.")] = False,
    plan: Annotated[bool, typer.Option("--plan", help="Only print sizes, memory and an estimate of the time; nothing is loaded.")] = False,
    json_output: Annotated[bool, typer.Option("--json", help="Print the report, or the plan, as JSON.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", help="No progress bars and no table.")] = False,
) -> None:
    """Quantize a model into a checkpoint that transformers loads.

    A run that ended early goes on where it was when the same command is given again. Several GPUs or machines:
    torchrun --nproc-per-node N -m rosaq quantize ...
    """
    from rosaq import Calibration, Means, load_recipe
    from rosaq import quantize as run
    from rosaq.distributed import current_ranks, joined
    from rosaq.memory import parse_size

    changes = {"salient": salient, "salient_per_head": salient_per_head, "salient_down": salient_down}
    chosen = load_recipe(recipe).replace(bits=bits, group_size=group_size, target_bits=target_bits, **changes)
    host, gpu = (None if size is None else parse_size(size) for size in (max_memory, max_device_memory))
    means, text = Means(host, force, gpu), Calibration(calibration, samples, seq_len, seed)
    if plan:
        from rosaq.forecast import forecast

        return show_plan(forecast(model, chosen, text, device, means, output), json_output)
    if output is None:
        raise typer.BadParameter("name the folder to make, or give --plan to see what it would take", param_hint="--output")
    with joined(device) as own_device:
        first = current_ranks().first
        with stage_bars(quiet or json_output or not first) as progress:
            report = run(model, output, chosen, text, own_device, progress, means)
    if first and json_output:
        show_json(vars(report))
    elif first and not quiet:
        _show_report(f"{output}: {chosen.name}", report)


def _show_report(title: str, report: "Report") -> None:
    stages = ", ".join(f"{stage} {seconds:.1f} s" for stage, seconds in report.seconds.items())
    rows = [
        *size_rows(report),
        ["FP16 file", f"{report.original_bytes / 1e6:.1f} MB"],
        ["time", f"{sum(report.seconds.values()):.1f} s: {stages}"],
        ["peak host memory", f"{report.peak_host_bytes / 2**30:.2f} GiB"],
    ]
    if report.peak_device_bytes:
        rows.append(["peak device memory", f"{report.peak_device_bytes / 2**30:.2f} GiB"])
    rows.append(["activations kept", PLACES.get(report.activations, "")])
    if report.resumed_blocks:
        rows.append(["from an earlier run", f"{report.resumed_blocks} blocks"])
    show_table(title, ["", "measured"], rows)
