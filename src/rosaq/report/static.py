"""The same plots for a paper, by matplotlib: PNG and SVG without dates in them."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rosaq.inspection.plots import require_matplotlib
from rosaq.report.drawing import MUTED, HeatMap, Plot, Series
from rosaq.report.interactive import AROUND_ONE, DECADES, INK, RATIO_DIGITS, around, colour, decades

COLUMNS = 3  # panels side by side
MARKERS = "osD^P X v*phdH8".replace(" ", "")
RESOLUTION = 150  # dots per inch of the PNG


def write_figures(plots: list[Plot], folder: Path) -> list[Path]:
    """Write each plot's panels as NAME.png and NAME.svg.

    Raises:
        ValueError: matplotlib is not installed, or the folder cannot be written.
    """
    require_matplotlib()
    import matplotlib  # noqa: PLC0415  (an optional dependency)

    written = []
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with matplotlib.rc_context({"svg.hashsalt": "rosaq", "svg.fonttype": "none", "font.size": 9}):
            for plot in plots:
                figure = draw(plot)
                for suffix, metadata in (("png", {}), ("svg", {"Date": None})):
                    written.append(folder / f"{plot.name}.{suffix}")
                    figure.savefig(written[-1], dpi=RESOLUTION, metadata=metadata)
    except OSError as error:
        raise ValueError(f"{folder}: cannot be written: {error.strerror}") from error
    return written


def draw(plot: Plot) -> Any:
    """A matplotlib figure of a plot's panels."""
    columns = min(COLUMNS, len(plot.panels))
    rows = -(-len(plot.panels) // columns)
    width = {1: 7.0, 2: 5.0, 3: 4.0}[columns]
    figure = require_matplotlib()(figsize=(width * columns, (4.2 if columns == 1 else 3.0) * rows), layout="constrained")
    axes = list(figure.subplots(rows, columns, squeeze=False).flat)
    for axis in axes[len(plot.panels) :]:
        axis.remove()
    for number, (axis, key) in enumerate(zip(axes, plot.panels, strict=False)):
        view = plot.views[key]
        axis.set(xlabel=plot.x.title, ylabel=plot.y.title if number % columns == 0 else "")
        axis.set_title(_panel_title(plot, key))
        if isinstance(view, HeatMap):
            _heat_map(figure, axis, view)
            continue
        for place, series in enumerate(view):
            _series(axis, series, place, [one for one in view if one.style == "bars"])
        if plot.y.log:
            _logarithmic(axis, decades(plot))
        if number == 0 and len([series for series in view if series.name]) > 1:
            axis.legend(fontsize="x-small", ncols=2 if len(view) > 6 else 1)
    return figure


def _logarithmic(axis: Any, spanned: float) -> None:
    """A logarithmic axis; where it spans little its labels are plain numbers."""
    from matplotlib.ticker import FuncFormatter  # noqa: PLC0415  (an optional dependency)

    axis.set_yscale("log")
    if spanned < DECADES:
        axis.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axis.yaxis.set_minor_formatter(FuncFormatter(lambda value, _: f"{value:g}" if f"{value:g}"[0] in "12345" else ""))


def _panel_title(plot: Plot, key: tuple[str, ...]) -> str:
    """What tells a panel from the others: the choices in which they differ."""
    differ = [place for place in range(len(key)) if len({panel[place] for panel in plot.panels}) > 1]
    return ", ".join(f"{plot.choices[place]} {key[place]}" if key[place].isdigit() else key[place] for place in differ)


def _series(axis: Any, series: Series, place: int, bars: list[Series]) -> None:
    shown, label = colour(series.colour), series.name or None
    if series.style == "bars":
        names = list(dict.fromkeys(name for one in bars for name in one.x))
        width = 0.8 / len(bars)
        offset = (bars.index(series) - (len(bars) - 1) / 2) * width
        axis.bar([names.index(name) + offset for name in series.x], series.y, width, color=shown, label=label)
        axis.set_xticks(range(len(names)), names, rotation=30 if len(names) > 4 else 0, ha="right" if len(names) > 4 else "center")
    elif series.style == "points":
        spread = series.spread if any(series.spread) else None
        marker = MARKERS[place % len(MARKERS)]
        width, size = (2.0, 7) if series.bold else (0.8, 5)
        axis.errorbar(list(series.x), list(series.y), spread, color=shown, marker=marker, markersize=size, linewidth=width, capsize=2, label=label)
    else:
        style, width = ("-", 0.8) if series.style == "line" else ("--", 1.0) if series.colour == MUTED else (":", 1.2)
        axis.plot(list(series.x), list(series.y), style, color=shown, linewidth=width, label=label)


def _heat_map(figure: Any, axis: Any, view: HeatMap) -> None:
    from matplotlib.colors import LinearSegmentedColormap  # noqa: PLC0415  (an optional dependency)

    every = max(1, len(view.x) // 10)
    axis.set_xticks(range(0, len(view.x), every), view.x[::every])
    axis.set_yticks(range(len(view.y)), view.y)
    if view.middle is None:
        picture = axis.imshow(_numbers(view.values), aspect="auto", cmap="viridis", interpolation="nearest")
        figure.colorbar(picture, ax=axis, label=view.unit)
        return
    powers, reach = around(view)
    scale = LinearSegmentedColormap.from_list("rosaq", AROUND_ONE)
    axis.imshow(_numbers(powers), aspect="auto", cmap=scale, vmin=-reach, vmax=reach, interpolation="nearest")
    for row, numbers in enumerate(view.values):
        for column, value in enumerate(numbers):
            if value is not None:
                axis.text(column, row, f"{value:.{RATIO_DIGITS}f}", ha="center", va="center", fontsize="x-small", color=INK)


def _numbers(rows: Sequence[Sequence[float | None]]) -> list[list[float]]:
    return [[float("nan") if value is None else value for value in row] for row in rows]
