"""The page: sections of what there is, each with its plot and tables, in one HTML file that needs nothing else."""

from dataclasses import dataclass, field
from importlib import resources

from rosaq.report.commands import commands
from rosaq.report.drawing import Plot
from rosaq.report.interactive import require_plotly, script, to_json
from rosaq.report.plots import all_plots
from rosaq.report.reading import Evidence, made_of
from rosaq.report.summary import sentences, title_of
from rosaq.report.tables import Grid, checkpoints, comparisons, decoded, evaluations, largest_channels, machines, timed, zero_shot
from rosaq.version import __version__

MANY_COLUMNS = 10  # from so many on a table is printed across the page


@dataclass(frozen=True)
class Section:
    """A part of the page.

    Attributes:
        name: of its anchor.
        title: its heading.
        caption: a sentence or two.
        plot: JSON of its plot, or "".
        tables: below the plot.
        commands: lines for the shell.
    """

    name: str
    title: str
    caption: str = ""
    plot: str = ""
    tables: list[Grid] = field(default_factory=list)
    commands: list[str] = field(default_factory=list)

    @property
    def wide(self) -> bool:
        """Whether it is printed across the page."""
        return any(len(table.head) >= MANY_COLUMNS for table in self.tables)


def make_page(evidence: Evidence, title: str | None = None) -> str:
    """The whole HTML page.

    Args:
        evidence: what was measured.
        title: the heading; by default the model's name.

    Raises:
        ValueError: plotly or jinja2 is not installed, or a file is not what it seems to be.
    """
    require_plotly()
    try:
        import jinja2  # noqa: PLC0415  (an optional dependency)
    except ImportError as error:
        raise ValueError("the report needs plotly and jinja2: pip install 'rosaq[report]'") from error
    folder = resources.files("rosaq.report").joinpath("template")
    text = {name: folder.joinpath(name).read_text(encoding="utf-8") for name in ("page.html", "style.css", "script.js")}
    parts, told = made_of(evidence, sections), made_of(evidence, sentences)
    environment = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined)
    return environment.from_string(text["page.html"]).render(
        title=title or made_of(evidence, title_of),
        sentences=told,
        sections=parts,
        style=text["style.css"],
        script=text["script.js"],
        plotly=script() if any(part.plot for part in parts) else "",
        sources=", ".join(dict.fromkeys(one.name for one in evidence.found)),
        version=__version__,
    )


def sections(evidence: Evidence) -> list[Section]:
    """The parts of the page that there is something for, in order."""
    plots = {plot.name: plot for plot in all_plots(evidence)}
    parts = [
        _tables("checkpoints", "What was quantized", "", [checkpoints(evidence)]),
        _tables("evaluations", "What it predicts", "", [evaluations(evidence), zero_shot(evidence)]),
        _drawn(plots, "pareto"),
        _tables("table5", "Every method", "The layout of the paper's Table 5; ROSAQ's rows are bold.", comparisons(evidence)),
        _drawn(plots, "magnitudes"),
        _tables("table8", "Largest channels", "Means over all attention and feed-forward inputs (Table 8 of the paper).", largest_channels(evidence)),
        *(_drawn(plots, name) for name in ("spectra", "errors")),
        _drawn(plots, "times", [timed(evidence)]),
        *(_drawn(plots, name) for name in ("kernels", "peers")),
        _drawn(plots, "decoding", [decoded(evidence)]),
        _tables("environment", "What it ran on", "", [machines(evidence)]),
        Section(
            "commands",
            "To repeat it",
            "Files and folders by the last part of their name; DATA is the folder of evaluation data.",
            "",
            [],
            commands(evidence),
        ),
    ]
    return [part for part in parts if part is not None and (part.plot or part.tables or part.commands)]


def _drawn(plots: dict[str, Plot], name: str, tables: list[Grid] | None = None) -> Section | None:
    if name not in plots:
        return None
    plot = plots[name]
    return Section(name, plot.title, plot.caption, to_json(plot), [table for table in tables or [] if table.rows])


def _tables(name: str, title: str, caption: str, tables: list[Grid]) -> Section | None:
    filled = [table for table in tables if table.rows]
    return Section(name, title, caption, "", filled) if filled else None
