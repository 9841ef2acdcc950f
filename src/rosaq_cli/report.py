"""`rosaq report`."""

from pathlib import Path
from typing import Annotated

import typer

from rosaq_cli.screen import results, show_json


def report(
    places: Annotated[list[Path], typer.Argument(help="Folders (or single JSON files) of what was measured.", show_default=False)],
    output: Annotated[Path, typer.Option("--output", "-o", help="HTML file to write.")] = Path("report.html"),
    figures: Annotated[Path | None, typer.Option(help="Folder for the same plots as PNG and SVG, for a paper.", show_default="none")] = None,
    title: Annotated[str | None, typer.Option(help="Heading of the page.", show_default="the model's name")] = None,
    json_output: Annotated[bool, typer.Option("--json", help="Print what was found and written as JSON.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", help="Print nothing.")] = False,
) -> None:
    """Make one HTML page, which needs no network, of what other commands have measured.

    It takes checkpoints, folders of compare and inspect, and the JSON that quantize, evaluate (--json) and benchmark (-o)
    give; each is told by what is in it, also in folders right inside the ones named.
    """
    from rosaq.comparison.results import write_text
    from rosaq.report.page import make_page
    from rosaq.report.plots import all_plots
    from rosaq.report.reading import read_evidence

    if output.is_dir():
        raise ValueError(f"{output}: is a folder; name a file, such as report.html")
    evidence = read_evidence(places)
    page = make_page(evidence, title)
    written = []
    if figures is not None:
        from rosaq.report.static import write_figures

        written = write_figures(all_plots(evidence), figures)
    write_text(output, page)
    found = [{"kind": one.kind, "path": str(one.path)} for one in evidence.found]
    if json_output:
        show_json({"found": found, "page": str(output), "figures": [str(file) for file in written]})
    if json_output or quiet:
        return
    kinds = ", ".join(f"{kind} {name}" for kind, name in dict.fromkeys((one.kind, one.name) for one in evidence.found))
    results.print(f"{output}: {kinds}" + (f"; {len(written)} figures in {figures}" if figures is not None else ""), highlight=False, soft_wrap=True)
