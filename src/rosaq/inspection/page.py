"""An inspection as files: JSON, plots as PNG and SVG, and one HTML page that needs nothing else."""

import base64
import html
import io
import json
import statistics
from pathlib import Path
from typing import Any

from rosaq.architecture import SITE_NORM
from rosaq.inspection.observation import GLOBAL, NORMALISED, OWN
from rosaq.inspection.plots import figures

CAPTIONS = {
    "magnitudes": "Mean |x| of each channel before and after rotation (Figure 2 of the paper).",
    "spectra": "Eigenvalues of each site's second moment over their sum; darker lines are deeper blocks.",
    "energy": "Share of the energy in the leading channels, by basis.",
    "outliers": "Kurtosis of the inputs, by basis.",
    "errors": "Relative error of each layer's weight, and of its output on the calibration text.",
}
BASES = {OWN: "before (what the layers see)", NORMALISED: "before, without the norm's weight", GLOBAL: "after rotation"}
STYLE = (
    "body{font:15px/1.5 system-ui,sans-serif;margin:2rem auto;max-width:70rem;color:#222}img{max-width:100%}"
    "table{border-collapse:collapse}th,td{padding:.2rem .8rem;text-align:right}th{border-bottom:2px solid #444}"
    "td:first-child,th:first-child{text-align:left}"
)
TABLE_HEAD = ["basis", "rank", "channel", "mean |x|", "eigenvalue (mean x²)"]


def table8(report: dict[str, Any]) -> list[list[str]]:
    """Rows under TABLE_HEAD: the channels of largest magnitude before and after rotation (ROSAQ Table 8)."""
    return [
        [BASES[basis], str(rank), str(row["index"]), f"{row['magnitude']:.4f}", f"{row['energy']:.4f}"]
        for basis, rows in report["table8"].items()
        for rank, row in enumerate(rows, 1)
    ]


def norm_spread(report: dict[str, Any]) -> str:
    """One line: how far the norms pull the channels apart, over blocks."""
    parts = []
    for site in SITE_NORM:
        found = [block[site]["norm_spread"] for block in report["blocks"]]
        parts.append(f"{site} {statistics.median(found):.2f} ({min(found):.2f} to {max(found):.2f})")
    return f"spread of the norms' weights (standard deviation of their logarithms), median over blocks: {', '.join(parts)}"


def write(report: dict[str, Any], folder: Path) -> list[Path]:
    """Write `inspection.json`, each plot as `.png` and `.svg`, and `inspection.html`.

    Raises:
        ValueError: matplotlib is not installed, or the folder cannot be written.
    """
    drawn, written, pictures = figures(report), [], {}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, figure in drawn.items():
            for suffix in ("png", "svg"):
                picture = io.BytesIO()
                figure.savefig(picture, format=suffix, dpi=110)
                (folder / f"{name}.{suffix}").write_bytes(picture.getvalue())
                written.append(folder / f"{name}.{suffix}")
                if suffix == "png":
                    pictures[name] = base64.b64encode(picture.getvalue()).decode()
        for name, text in (("inspection.json", json.dumps(report) + "\n"), ("inspection.html", _page(report, pictures))):
            (folder / name).write_text(text, encoding="utf-8")
            written.append(folder / name)
    except OSError as error:
        raise ValueError(f"{folder}: cannot be written: {error.strerror}") from error
    return written


def _page(report: dict[str, Any], pictures: dict[str, str]) -> str:
    title = html.escape(f"Inspection of {Path(report['model']).name}")
    calibration, settings = report["calibration"], report["settings"]
    about = (
        f"{calibration['samples']} windows of {calibration['seq_len']} tokens of {calibration['text']}; {settings['salient']} leading channels, "
        f"{settings['salient_per_head']} of each head; {norm_spread(report)}."
    )
    rows = "".join("<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>" for row in table8(report))
    head = "".join(f"<th>{html.escape(name)}</th>" for name in TABLE_HEAD)
    images = "".join(
        f'<h2>{html.escape(CAPTIONS[name])}</h2><img alt="{name}" src="data:image/png;base64,{data}">' for name, data in pictures.items()
    )
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{title}</title><style>{STYLE}</style></head><body><h1>{title}</h1>'
        f"<p>{html.escape(about)}</p><h2>Channels of largest magnitude, mean of all attn_in and mlp_in sites (Table 8 of the paper)</h2>"
        f"<table><tr>{head}</tr>{rows}</table>{images}</body></html>\n"
    )
