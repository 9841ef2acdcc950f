"""Draws docs/images/rosaq.svg, how ROSAQ works, with the channel magnitudes of a real model.

Usage: python scripts/picture.py MODEL CALIBRATION_FILE docs/images/rosaq.svg [--block 15] [--samples 16] [--seq-len 256]

The model must be 576 channels wide (SmolLM2-135M): the picture has 72 bars of 8 channels, 8 of them salient.
"""

import argparse
from pathlib import Path

import torch

import rosaq
from rosaq.basis import residual_basis

BARS, SALIENT = 72, 8
LEFT, MIDDLE, WIDTH = 30, 330, 252  # of the two plots, pixels
STYLE = """
  .card{fill:#ffffff;stroke:#d0d7de} text{fill:#1f2328;font:13px system-ui,-apple-system,'Segoe UI',Helvetica,Arial,sans-serif}
  .title{font-size:15px;font-weight:600} .small{font-size:12px} .mono{font-family:ui-monospace,'SF Mono',Menlo,Consolas,monospace}
  .salient{fill:#bc4c00} .rest{fill:#3a78c9} .raw{fill:#818b98} .line{stroke:#818b98;fill:none;stroke-width:1.5} .head{fill:#818b98}
  .grid{stroke:#ffffff;stroke-opacity:.65} .box{fill:#eef2f7;stroke:#d0d7de} .onfill{fill:#ffffff;font-weight:600}
  @media (prefers-color-scheme: dark){
    .card{fill:#161b22;stroke:#3d444d} text{fill:#e6edf3} .salient{fill:#db6d28} .rest{fill:#4184e4} .raw{fill:#7d8590}
    .grid{stroke:#161b22} .box{fill:#222a35;stroke:#3d444d} .onfill{fill:#ffffff}
  }
"""


def bars(values: list[float], left: float, bottom: float, height: float, salient: int) -> list[str]:
    """One bar each, its height by the square root of the value; the first `salient` ones and the others by class."""
    step, top = WIDTH / len(values), max(values) ** 0.5
    lines = []
    for index, value in enumerate(values):
        tall = height * value**0.5 / top
        kind = "raw" if not salient else "salient" if index < salient else "rest"
        lines.append(f'<rect class="{kind}" x="{left + index * step:.2f}" y="{bottom - tall:.2f}" width="{step - 0.7:.2f}" height="{tall:.2f}"/>')
    return lines


def words(x: float, y: float, *lines: str, kind: str = "", step: int = 17, anchor: str = "start") -> list[str]:
    """Lines of text, one below the other."""
    return [f'<text class="{kind}" x="{x}" y="{y + index * step}" text-anchor="{anchor}">{line}</text>' for index, line in enumerate(lines)]


def arrow(x: float, y: float, to_x: float, to_y: float) -> list[str]:
    """A line with a head."""
    return [f'<line class="line" x1="{x}" y1="{y}" x2="{to_x}" y2="{to_y}" marker-end="url(#arrow)"/>']


def picture(before: list[float], after: list[float], share: float) -> str:
    """The whole SVG.

    Args:
        before: root mean square of each bar's channels in the model's own basis.
        after: the same in the basis R.
        share: of the energy, in the salient channels.
    """
    step = WIDTH / BARS
    edge = MIDDLE + SALIENT * step
    parts = [*words(LEFT, 42, "1  Inputs x of a layer", kind="title"), *bars(before, LEFT, 160, 100, 0)]
    parts += words(LEFT, 180, "each bar: 8 of 576 channels; a few are large", kind="small")
    parts += [*arrow(LEFT + WIDTH + 6, 110, MIDDLE - 8, 110), *words((LEFT + WIDTH + MIDDLE) / 2, 100, "x R", anchor="middle")]
    parts += [*words(MIDDLE, 42, "2  The same inputs in the basis R", kind="title"), *bars(after, MIDDLE, 160, 100, SALIENT)]
    parts += words(MIDDLE, 180, f"the leading 64 channels have {100 * share:.0f} % of the energy", kind="small")
    parts += words(MIDDLE, 222, "3  Weights, a column per channel", kind="title")
    parts.append(f'<rect class="salient" x="{MIDDLE}" y="234" width="{SALIENT * step:.2f}" height="96"/>')
    parts.append(f'<rect class="rest" x="{edge:.2f}" y="234" width="{WIDTH - SALIENT * step:.2f}" height="96"/>')
    groups = [edge + index * (WIDTH - SALIENT * step) / 8 for index in range(1, 8)]
    parts += [f'<line class="grid" x1="{x:.2f}" y1="234" x2="{x:.2f}" y2="330"/>' for x in groups]
    parts += words((edge + MIDDLE + WIDTH) / 2, 287, "INT4 or INT3", kind="onfill", anchor="middle")
    parts += words(MIDDLE, 350, "left: INT8 or FP16, not rounded coarsely", "right: a scale and a zero point per group", kind="small")
    parts += words(LEFT, 222, "R: eigenvectors of XᵀX", kind="title")
    parts += words(LEFT, 245, "X: inputs of all layers over some", "calibration text; largest eigenvalue first.")
    parts += words(LEFT, 300, "The layer at run time", kind="title")
    parts += words(LEFT, 324, "y = x[:, :K] W_salientᵀ", "&#160;&#160;+ x[:, K:] ((code - zero) scale)ᵀ", kind="mono small")
    right = 630
    parts += words(right, 42, "R costs nothing at run time", kind="title")
    boxes = [
        ("embedding, o, down", "write the residual stream in the basis R"),
        ("RMSNorm", "its weight is folded into the layers behind it;"),
        ("q, k, v, gate, up, lm_head", "read the residual stream there: W R"),
    ]
    for index, (name, what) in enumerate(boxes):
        y = 60 + 82 * index
        parts += [f'<rect class="box" x="{right}" y="{y}" width="290" height="56" rx="6"/>']
        parts += [*words(right + 12, y + 23, name, kind="mono"), *words(right + 12, y + 43, what, kind="small")]
        if index < 2:
            parts += arrow(right + 145, y + 58, right + 145, y + 78)
    parts += words(right, 300, "then (h R) / rms(h R) = (h / rms(h)) R, since R", "keeps lengths. The attention output has its own", kind="small")
    parts += words(right, 334, "R per key-value head, absorbed by v and o.", kind="small")
    place = 'viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" orient="auto"'
    marker = f'<marker id="arrow" {place}><path class="head" d="M0 0 8 4 0 8z"/></marker>'
    title = "<title>ROSAQ: rotate by the principal components, keep the leading channels precise, round the others</title>"
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 950 390" role="img">{title}<style>{STYLE}</style><defs>{marker}</defs>\n'
        + '<rect class="card" x="0.5" y="0.5" width="949" height="389" rx="8"/>\n'
        + "\n".join(parts)
        + "\n</svg>\n"
    )


def main() -> None:
    """Measure one block's inputs and draw."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("calibration")
    parser.add_argument("out", type=Path)
    parser.add_argument("--block", type=int, default=15)
    parser.add_argument("--samples", type=int, default=16, help="calibration windows")
    parser.add_argument("--seq-len", type=int, default=256, help="tokens per window")
    arguments = parser.parse_args()
    source = rosaq.open_source(arguments.model)
    statistics = rosaq.measure(source, rosaq.Calibration(arguments.calibration, arguments.samples, arguments.seq_len))
    basis = residual_basis(statistics.residual_moment(), rosaq.load_recipe("rosaq-int4"))
    moment = statistics.inputs[arguments.block]["attn_in"].moment.double()
    energies = [moment.diagonal(), (basis.T @ moment @ basis).diagonal()]
    share = float(energies[1][:64].sum() / energies[1].sum())
    before, after = (energy.view(BARS, -1).mean(1).clamp_min(0).sqrt().tolist() for energy in energies)
    arguments.out.write_text(picture(before, after, share), encoding="utf-8")
    print(f"{arguments.out}: {100 * share:.1f} % of the energy in 64 of {len(energies[0])} channels, {torch.__version__}")


if __name__ == "__main__":
    main()
