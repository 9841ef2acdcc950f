"""What there is to draw: every plot that there is data for, out of what was measured."""

import itertools
from collections.abc import Callable, Sequence
from statistics import fmean
from typing import Any

import numpy as np

from rosaq.comparison.experiment import PERPLEXITY
from rosaq.inspection.observation import OWN
from rosaq.inspection.plots import ROLES
from rosaq.inspection.report import ROTATED, SPECTRUM
from rosaq.report.drawing import MUTED, OURS, Axis, HeatMap, Plot, Series, View
from rosaq.report.reading import Evidence, Found, is_rosaq

DEPTHS = 6  # lines of a plot that cannot show every block
KERNELS = {"rosaq": OURS, "cublas": 1, "marlin": 2, "machete": 3, "triton": 4}
SITE_NAMES = {"attn_in": "attention input", "mlp_in": "feed-forward input", "attn_out": "attention output"}


def all_plots(evidence: Evidence) -> list[Plot]:
    """Every plot that there is data for, in the order of the page."""
    inspections = evidence.of("inspection")
    drawn = [
        _plot_of(evidence.of("comparison"), pareto),
        _plot_of(inspections, magnitudes),
        _plot_of(inspections, spectra),
        _plot_of([one for one in inspections if one.data["errors"]], errors),
        times(evidence),
        _plot_of(evidence.of("kernels"), kernel_limits),
        _plot_of([one for one in evidence.of("kernels") if any(row["to_best_peer"] for row in one.data["rows"])], kernel_ratios),
        _plot_of([one for one in evidence.of("decoding") if one.data["rows"]], decoding),
    ]
    return [plot for plot in drawn if plot is not None]


def _plot_of(found: list[Found], draw: Any) -> Plot | None:
    """One plot of all that is of a kind; a person chooses which."""
    if not found:
        return None
    plots = [draw(one) for one in found]
    first, names = plots[0], unique([one.name for one in found])
    views = {(name, *key): view for name, plot in zip(names, plots, strict=True) for key, view in plot.views.items()}
    panels = tuple((name, *key) for name, plot in zip(names, plots, strict=True) for key in plot.panels)
    return Plot(first.name, first.title, first.caption, first.x, first.y, ("of", *first.choices), views, panels)


def unique(names: list[str]) -> list[str]:
    """The names, with a number behind those that are there already."""
    return [name if names.index(name) == index else f"{name} ({names[:index].count(name) + 1})" for index, name in enumerate(names)]


def pareto(one: Found) -> Plot:
    """Bits per weight against WikiText-2 perplexity: one line a method, its seeds averaged."""
    methods: dict[str, dict[int, list[dict[str, Any]]]] = {}
    ours: dict[str, bool] = {}
    original = None
    for cell, values in one.cells:
        if PERPLEXITY not in values["figures"]:
            continue
        if cell.recipe is None:
            original = values["figures"][PERPLEXITY]["perplexity"]
        else:
            bits, name = cell.row
            ours[name] = is_rosaq(cell.recipe)
            methods.setdefault(name, {}).setdefault(bits, []).append(values)
    series, others, points = [], itertools.count(1), []
    for name, by_bits in methods.items():
        rows = sorted((cells[0]["bits_per_weight"], *_over_seeds(cells), bits) for bits, cells in by_bits.items())
        points += [(row[0], row[1]) for row in rows]
        labels = {bits: f"INT{bits}" if bits else "INT2 to INT4" for bits in by_bits}
        notes = [f"{name}, {labels[bits]}: {width:.2f} bits per weight, perplexity {value:.2f}" for width, value, _, bits in rows]
        widths, perplexities, spreads = ([float(row[part]) for row in rows] for part in range(3))
        series.append(Series(name, widths, perplexities, "points", next(others), notes, spreads, ours[name]))
    series.sort(key=lambda line: line.bold)
    front = pareto_front(points)
    series.append(Series("Pareto front", [x for x, _ in front], [y for _, y in front], "rule", MUTED))
    if original is not None and points:
        ends = [min(x for x, _ in points), max(x for x, _ in points)]
        series.append(Series("FP16", ends, [original, original], "rule", OURS))
    caption = (
        "Lower and further left is better; ROSAQ's lines are thick. The dashed line joins what no other method beats in both, the dotted one is the "
        "original."
    )
    x, y = Axis("bits per weight, all stored bits counted"), Axis("WikiText-2 perplexity", log=True)
    return Plot("pareto", "Size against loss", caption, x, y, (), {(): tuple(series)}, ((),))


def _over_seeds(cells: list[dict[str, Any]]) -> tuple[float, float]:
    values = [cell["figures"][PERPLEXITY]["perplexity"] for cell in cells]
    return fmean(values), float(np.std(values, ddof=1)) if len(values) > 1 else 0.0


def pareto_front(points: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """The points that no other one beats in both, by x."""
    front: list[tuple[float, float]] = []
    for point in sorted(points):
        if not front or point[1] < front[-1][1]:
            front.append(point)
    return front


def magnitudes(one: Found) -> Plot:
    """Mean |x| of each channel before and after rotation (ROSAQ Figure 2), by site and block."""
    views: dict[tuple[str, ...], View] = {}
    blocks = one.data["blocks"]
    for (site, basis), (depth, block) in itertools.product(ROTATED.items(), enumerate(blocks)):
        found = block[site]["magnitude"]
        views[SITE_NAMES[site], str(depth)] = (
            Series("before", _numbers(found[OWN]), found[OWN], colour=1),
            Series("after rotation", _numbers(found[basis]), found[basis], colour=OURS),
        )
    depths = sorted({0, len(blocks) // 2, len(blocks) - 1})
    panels = tuple((SITE_NAMES[site], str(depth)) for site in ROTATED for depth in depths)
    caption = (
        "Mean |x| of each input channel. After the rotation what is large lies in the leading channels, which stay precise (Figure 2 of the paper). "
        "Before it, the norm's weight is in the inputs; the rotation moves it into the layers."
    )
    return Plot(
        "magnitudes", "Channels before and after rotation", caption, Axis("channel"), Axis("mean |x|", log=True), ("site", "block"), views, panels
    )


def spectra(one: Found) -> Plot:
    """Eigenvalues of each site's second moment over their sum, for blocks over the whole depth."""
    views: dict[tuple[str, ...], View] = {}
    blocks = one.data["blocks"]
    chosen = sorted({round(index * (len(blocks) - 1) / (DEPTHS - 1)) for index in range(DEPTHS)})
    for site in SPECTRUM:
        lines = []
        for number, depth in enumerate(chosen):
            values = blocks[depth][site]["eigenvalues"]
            lines.append(Series(f"block {depth}", _numbers(values), [value / sum(values) for value in values], colour=number))
        views[(SITE_NAMES[site],)] = tuple(lines)
    caption = "Share of the energy in each principal component, largest first. Of the attention output: the mean over heads."
    x, y = Axis("component"), Axis("share of the energy", log=True)
    return Plot("spectra", "Eigenvalues", caption, x, y, ("site",), views, tuple(views))


def errors(one: Found) -> Plot:
    """Relative error of each layer's output and weight, layers against depth."""
    layers = max(error["block"] for error in one.data["errors"]) + 1
    views: dict[tuple[str, ...], View] = {}
    for name in ("output", "weight"):
        values: list[list[float | None]] = [[None] * layers for _ in ROLES]
        for error in one.data["errors"]:
            values[ROLES.index(error["role"])][error["block"]] = error[name]
        views[(name,)] = HeatMap([str(index) for index in range(layers)], ROLES, values, f"relative error of the {name}")
    caption = "What rounding loses in each layer: of its output on the calibration text, or of its weight."
    return Plot(
        "errors", "Error of each layer", caption, Axis("block", names=True), Axis("layer", names=True), ("error of the",), views, tuple(views)
    )


def times(evidence: Evidence) -> Plot | None:
    """Seconds of each stage of every run that recorded them."""
    runs = [(one.name, one.data["seconds"]) for one in evidence.of("run")]
    runs += [(f"{one.name}: {one.data['shape']}", one.data["seconds_of_all_blocks"]) for one in evidence.of("quantizing")]
    for one in evidence.of("comparison"):
        for cell, values in one.cells:
            if cell.recipe is not None and (seconds := _quantizing(values["runs"][0]["seconds"])):
                runs.append((f"{one.name}: {cell.name}", seconds))
    if not runs:
        return None
    views: dict[tuple[str, ...], View] = {}
    for name, (_, seconds) in zip(unique([name for name, _ in runs]), runs, strict=True):
        total = sum(seconds.values()) or 1.0
        notes = [f"{stage}: {time:.2f} s, {100 * time / total:.1f} %" for stage, time in seconds.items()]
        views[(name,)] = (Series("", list(seconds), list(seconds.values()), "bars", OURS, notes),)
    caption = "Time of each stage of quantizing; together they are the whole run."
    return Plot("times", "Where the time goes", caption, Axis("stage", names=True), Axis("seconds"), ("run",), views, (next(iter(views)),))


def _quantizing(seconds: dict[str, float]) -> dict[str, float]:
    return {name.removeprefix("quantize: "): time for name, time in seconds.items() if name.startswith("quantize: ")}


def _rows_of(one: Found, key: Callable[[dict[str, Any]], str]) -> dict[str, list[dict[str, Any]]]:
    """The rows of a benchmark, by what they have in common."""
    found: dict[str, list[dict[str, Any]]] = {}
    for row in one.data["rows"]:
        found.setdefault(key(row), []).append(row)
    return found


def _layer(row: dict[str, Any]) -> str:
    return f"{row['layer']}, INT{row['bits']}"


def kernel_limits(one: Found) -> Plot:
    """How much of the limit each kernel reaches, against the number of tokens; 1 is the limit."""
    views: dict[tuple[str, ...], View] = {}
    for layer, rows in _rows_of(one, _layer).items():
        lines = []
        for kernel in dict.fromkeys(name for row in rows for name in row["microseconds"]):
            mine = [(str(row["tokens"]), row["microseconds"][kernel], row["limit_us"]) for row in rows if kernel in row["microseconds"]]
            notes = [f"{kernel}, {tokens} tokens: {time:.1f} us; the limit is {limit:.1f} us" for tokens, time, limit in mine]
            colour = KERNELS.get(kernel, len(KERNELS))
            lines.append(
                Series(
                    kernel,
                    [tokens for tokens, *_ in mine],
                    [limit / time for _, time, limit in mine],
                    "points",
                    colour,
                    notes,
                    bold=kernel == "rosaq",
                )
            )
        lines.append(Series("limit", [str(row["tokens"]) for row in rows], [1.0] * len(rows), "rule", MUTED))
        views[(layer,)] = tuple(lines)
    caption = (
        "Share of the limit: the time in which the quantized weight can be read, or its products made, over the kernel's time. Peers at 4 bits have "
        "no salient channels."
    )
    x, y = Axis("tokens", names=True), Axis("share of the limit")
    return Plot("kernels", "Kernels against the limit", caption, x, y, ("layer",), views, tuple(views)[:6])


def kernel_ratios(one: Found) -> Plot:
    """Time of the fastest peer over ours, layers against tokens."""
    by_layer = _rows_of(one, _layer)
    tokens = sorted({row["tokens"] for row in one.data["rows"]})
    values = [
        [next((1 / row["to_best_peer"] for row in rows if row["tokens"] == count and row["to_best_peer"]), None) for count in tokens]
        for rows in by_layer.values()
    ]
    drawn = HeatMap([str(count) for count in tokens], list(by_layer), values, "speed to the best peer", 1.0)
    caption = (
        "Time of the fastest of cuBLAS in FP16, Marlin and Machete, as far as they were timed, over that of rosaq's kernel: above 1 rosaq is faster."
    )
    return Plot("peers", "Kernels against peers", caption, Axis("tokens", names=True), Axis("", names=True), (), {(): drawn}, ((),))


def decoding(one: Found) -> Plot:
    """Tokens per second of whole models, by batch and length."""
    views: dict[tuple[str, ...], View] = {}
    order = ("rosaq", "fp16", "machete", "marlin", "w4a16")
    for engine, rows in _rows_of(one, lambda row: str(row["engine"])).items():
        bars = []
        for weights in sorted({row["weights"] for row in rows}, key=order.index):
            mine = [row for row in rows if row["weights"] == weights]
            notes = [_decoded(row) for row in mine]
            pairs = [f"{row['batch']} x {row['tokens']}" for row in mine]
            bars.append(Series(weights, pairs, [row["throughput"] for row in mine], "bars", order.index(weights), notes))
        views[(engine,)] = tuple(bars)
    caption = "Tokens per second over the whole batch; as many tokens are generated as are given (Eq. 9 and 10 of the paper)."
    x, y = Axis("batch x tokens", names=True), Axis("tokens per second")
    return Plot("decoding", "Decoding", caption, x, y, ("engine",), views, tuple(views))


def _decoded(row: dict[str, Any]) -> str:
    ratios = [f"{row[key]:.2f} times {name}" for key, name in (("to_fp16", "FP16"), ("to_best_peer", "the best peer")) if row[key] is not None]
    return f"{row['weights']}: {row['step_ms']:.2f} ms per step, " + ", ".join([f"{row['throughput']:.0f} tokens/s", *ratios])


def _numbers(values: Sequence[float]) -> list[int]:
    return list(range(len(values)))
