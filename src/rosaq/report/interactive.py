"""Plots that a person can point at and choose in, by plotly; the page sets the colours of its own background."""

import json
import math
from typing import Any

import numpy as np

from rosaq.report.drawing import MUTED, Axis, HeatMap, Plot, Series

# Legible on white and on near-black; rosaq's own is the first.
COLOURS = (
    "#3b82d6",
    "#e07b39",
    "#2f9e6e",
    "#a970d8",
    "#d9548a",
    "#b08a1e",
    "#1f9fb0",
    "#d64545",
    "#7a8f2a",
    "#8c6d5a",
    "#5f7fae",
    "#c06fc0",
    "#4d8f4d",
)
GREY = "#8a8f98"
SYMBOLS = (
    "circle",
    "square",
    "diamond",
    "triangle-up",
    "cross",
    "x",
    "triangle-down",
    "star",
    "pentagon",
    "hexagon",
    "hourglass",
    "bowtie",
    "asterisk",
)
DECADES = 1.5  # from so many on a logarithmic axis has labels at powers of ten only
TICKS = 16  # labels of an axis of names, at most
AROUND_ONE = ((0.0, "#e88080"), (0.5, "#eef0f2"), (1.0, "#6cc39b"))
INK = "#1d2129"  # of numbers on these
RATIO_DIGITS = 2


def require_plotly() -> Any:
    """The module plotly.

    Raises:
        ValueError: it is not installed.
    """
    try:
        import plotly.graph_objects  # noqa: PLC0415  (an optional dependency)
    except ImportError as error:
        raise ValueError("the report needs plotly and jinja2: pip install 'rosaq[report]'") from error
    return plotly


def script() -> str:
    """The whole of plotly.js, so that the page needs no network."""
    require_plotly()
    from plotly.offline import get_plotlyjs  # noqa: PLC0415

    return str(get_plotlyjs())


def to_json(plot: Plot) -> str:
    """A plot for the page's script: its choices, its layout, and the traces of each view by the chosen values joined by a line feed.

    Arrays are in plotly's binary form, four bytes a number. Safe inside a script element.
    """
    go = require_plotly().graph_objects
    from plotly.io.json import to_json_plotly  # noqa: PLC0415

    traces = {}
    for key, view in plot.views.items():
        drawn = [_heat_map(go, view)] if isinstance(view, HeatMap) else [_trace(go, series, plot) for series in view]
        traces["\n".join(key)] = [trace.to_plotly_json() for trace in drawn]
    heat = any(isinstance(view, HeatMap) for view in plot.views.values())
    layout = {
        "xaxis": _axis(plot.x, 0),
        "yaxis": {**_axis(plot.y, decades(plot)), **({"autorange": "reversed"} if heat else {})},
        "showlegend": any(isinstance(view, tuple) and len([s for s in view if s.name]) > 1 for view in plot.views.values()),
        "hovermode": "closest" if heat or plot.x.names or plot.name == "pareto" else "x",
        "barmode": "group",
    }
    choices = [{"name": name, "values": list(dict.fromkeys(key[place] for key in plot.views))} for place, name in enumerate(plot.choices)]
    value = {"name": plot.name, "title": plot.title, "choices": choices, "views": traces, "layout": go.Layout(layout).to_plotly_json()}
    text = str(to_json_plotly(value))
    json.loads(text)  # NaN would be no JSON, and the page would be empty
    return text.replace("<", "\\u003c")


def colour(number: int) -> str:
    """The colour of a number."""
    return GREY if number == MUTED else COLOURS[number % len(COLOURS)]


def _trace(go: Any, series: Series, plot: Plot) -> Any:
    """One trace of plotly."""
    common: dict[str, Any] = {"name": series.name, "showlegend": bool(series.name), "y": np.asarray(series.y, dtype=np.float32)}
    if plot.x.names:
        common["x"] = list(series.x)
    elif list(series.x) != list(range(len(series.y))):  # which is what plotly takes where nothing is said
        common["x"] = np.asarray(series.x, dtype=np.float32)
    if series.notes:
        common |= {"hovertext": list(series.notes), "hoverinfo": "text"}
    if any(series.spread):
        common["error_y"] = {"type": "data", "array": np.asarray(series.spread, dtype=np.float32), "thickness": 1}
    shown = colour(series.colour)
    if series.style == "bars":
        return go.Bar(**common, marker={"color": shown})
    if series.style == "rule":
        common["hoverinfo"] = "skip"
        return go.Scatter(**common, mode="lines", line={"color": shown, "dash": "dash" if series.colour == MUTED else "dot", "width": 1.5})
    if series.style == "points":
        marker = {"color": shown, "size": 12 if series.bold else 8, "symbol": SYMBOLS[series.colour % len(SYMBOLS)]}
        return go.Scatter(**common, mode="lines+markers", line={"color": shown, "width": 2.4 if series.bold else 1}, marker=marker)
    return go.Scatter(**common, mode="lines", line={"color": shown, "width": 1.3})


def _heat_map(go: Any, view: HeatMap) -> Any:
    values = [[None if value is None else float(f"{value:.5g}") for value in row] for row in view.values]
    shown = {"x": list(view.x), "y": list(view.y), "xgap": 1, "ygap": 1}
    if view.middle is None:
        bar = {"thickness": 12, "outlinewidth": 0}
        return go.Heatmap(**shown, z=values, hovertemplate="%{y}, %{x}: %{z}<extra></extra>", colorbar=bar, colorscale="Viridis")
    text = [["" if value is None else f"{value:.{RATIO_DIGITS}f}" for value in row] for row in values]
    powers, reach = around(view)
    written = {"text": text, "texttemplate": "%{text}", "textfont": {"color": INK}, "hovertemplate": "%{y}, %{x}: %{text}<extra></extra>"}
    return go.Heatmap(**shown, z=powers, **written, colorscale=AROUND_ONE, zmin=-reach, zmax=reach, showscale=False)


def around(view: HeatMap) -> tuple[list[list[float | None]], float]:
    """Powers of two between a heat map's numbers and its middle, so that twice and half are equally far; and the farthest."""
    assert view.middle is not None
    powers = [[None if value is None else math.log2(value / view.middle) for value in row] for row in view.values]
    return powers, max((abs(power) for row in powers for power in row if power is not None), default=1.0) or 1.0


def _axis(axis: Axis, decades: float) -> dict[str, Any]:
    kind = "category" if axis.names else "log" if axis.log else "linear"
    found: dict[str, Any] = {"title": {"text": axis.title, "standoff": 10}, "type": kind, "automargin": True}
    if axis.log:
        found |= {"exponentformat": "power", **({"dtick": 1} if decades > DECADES else {})}
    return {**found, **({"nticks": TICKS} if axis.names else {})}


def decades(plot: Plot) -> float:
    """The powers of ten that the numbers of a logarithmic plot span."""
    values = [float(value) for view in plot.views.values() if isinstance(view, tuple) for one in view for value in one.y if value > 0]
    return math.log10(max(values) / min(values)) if values and plot.y.log else 0.0
