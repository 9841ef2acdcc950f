"""Plots of an inspection, by matplotlib: Figure 2 of the paper, spectra, energy shares, errors."""

import statistics
from collections.abc import Callable
from typing import Any

import numpy as np

from rosaq.inspection.observation import GLOBAL, HEADS, LOCAL, NORMALISED, OWN
from rosaq.inspection.report import ROTATED, SPECTRUM

COLOURS = {OWN: "#c0504d", NORMALISED: "#e5a54b", GLOBAL: "#3b6ea5", LOCAL: "#58a55c", HEADS: "#3b6ea5"}
ROLES = ("q", "k", "v", "o", "gate", "up", "down")


def require_matplotlib() -> Any:
    """The class Figure of matplotlib, which draws without a window.

    Raises:
        ValueError: it is not installed.
    """
    try:
        from matplotlib.figure import Figure  # noqa: PLC0415  (an optional dependency)
    except ImportError as error:
        raise ValueError("plots need matplotlib: pip install 'rosaq[plots]'") from error
    return Figure


def figures(report: dict[str, Any]) -> dict[str, Any]:
    """All plots of a report, by name: matplotlib figures."""
    drawn: dict[str, Callable[[dict[str, Any]], Any]] = {"magnitudes": magnitudes, "spectra": spectra, "energy": energy, "outliers": outlier_lines}
    if report["errors"]:
        drawn["errors"] = error_lines
    return {name: draw(report) for name, draw in drawn.items()}


def magnitudes(report: dict[str, Any]) -> Any:
    """Mean |x| of each channel, before and after, for three depths and each rotated site (ROSAQ Figure 2)."""
    blocks = report["blocks"]
    depths = sorted({0, len(blocks) // 2, len(blocks) - 1})
    figure = require_matplotlib()(figsize=(4.2 * len(depths), 2.6 * len(ROTATED)), layout="constrained")
    axes = figure.subplots(len(ROTATED), len(depths), squeeze=False)
    for row, (site, basis) in zip(axes, ROTATED.items(), strict=True):
        for axis, depth in zip(row, depths, strict=True):
            for name, label in ((OWN, "before"), (basis, "after")):
                axis.plot(blocks[depth][site]["magnitude"][name], color=COLOURS[name], linewidth=0.8, label=label)
            axis.set(title=f"{site}, block {depth}", xlabel="channel", ylabel="mean |x|", yscale="log")
    axes[0][0].legend()
    return figure


def spectra(report: dict[str, Any]) -> Any:
    """Eigenvalues of each site's second moment, over their sum; one line a block, darker is deeper."""
    blocks = report["blocks"]
    figure = require_matplotlib()(figsize=(4.2 * len(SPECTRUM), 3), layout="constrained")
    for axis, site in zip(figure.subplots(1, len(SPECTRUM)), SPECTRUM, strict=True):
        for depth, block in enumerate(blocks):
            values = np.array(block[site]["eigenvalues"])
            axis.plot(values / values.sum(), color=COLOURS[GLOBAL], alpha=0.2 + 0.8 * depth / len(blocks), linewidth=0.8)
        axis.set(title=f"{site}{' (mean of heads)' if site == 'attn_out' else ''}", xlabel="component", ylabel="share of the energy", yscale="log")
    return figure


def _lines(report: dict[str, Any], name: str, label: str, log: bool) -> Any:
    """A figure of every site against depth, one line a basis."""
    blocks = report["blocks"]
    figure = require_matplotlib()(figsize=(16, 3), layout="constrained")
    for axis, site in zip(figure.subplots(1, len(blocks[0])), blocks[0], strict=True):
        for basis in blocks[0][site]["figures"]:
            axis.plot([block[site]["figures"][basis][name] for block in blocks], color=COLOURS[basis], label=basis)
        axis.set(title=site, xlabel="block", ylabel=label)
        if log:
            axis.set_yscale("log")
        axis.legend(fontsize="small")
    return figure


def energy(report: dict[str, Any]) -> Any:
    """Share of the energy in the leading channels against depth."""
    return _lines(report, "top_energy", f"energy in the top {report['settings']['salient']} ({report['settings']['salient_per_head']} a head)", False)


def outlier_lines(report: dict[str, Any]) -> Any:
    """Kurtosis of the inputs against depth."""
    return _lines(report, "kurtosis", "kurtosis (Gaussian: 3)", True)


def error_lines(report: dict[str, Any]) -> Any:
    """Relative error of each layer's weight and output against depth."""
    figure = require_matplotlib()(figsize=(11, 3.2), layout="constrained")
    for axis, name in zip(figure.subplots(1, 2), ("weight", "output"), strict=True):
        for role in ROLES:
            errors = [error[name] for error in report["errors"] if error["role"] == role]
            axis.plot(errors, label=f"{role}, median {statistics.median(errors):.3f}")
        axis.set(title=f"relative error of the {name}", xlabel="block")
        axis.legend(fontsize="x-small")
    return figure
