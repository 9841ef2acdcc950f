"""When does rotation (ROSAQ) beat keeping the channels of largest magnitude (Mixed)? Measurements on a model, and on planted outliers.

Writes DIR/rotation_or_magnitude.json and .png, and prints what it found. Errors are of each layer's output on the calibration text, relative;
"ratio" is ROSAQ's over Mixed's, so below 1 rotation is better. W_down is the same in both and left out.
Usage: python examples/rotation_or_magnitude.py MODEL CALIBRATION -o DIR [--other TEXT] [--samples 16] [--seq-len 512] [--every 5]
"""

import argparse
import dataclasses
import json
import statistics
from pathlib import Path

import torch
from planted_outliers import planted

import rosaq
from rosaq.architecture import LINEARS, NORMS, SITE_NORM, SITES
from rosaq.clock import no_progress
from rosaq.device import resolve_device
from rosaq.inspection.channels import outliers
from rosaq.inspection.errors import recipe_errors, relative_errors
from rosaq.inspection.observation import observe
from rosaq.inspection.plots import require_matplotlib
from rosaq.layout import LinearLayout
from rosaq.rotation import principal_basis
from rosaq.rounding.grid import round_to_nearest
from rosaq.saliency import salient_first
from rosaq_cli.screen import results, show_table

ROLES = ("q", "k", "v", "o", "gate", "up")
METHODS = {"mixed": "mixed", "rosaq": "rosaq-paper", "per-layer": "rosaq-paper-per-layer"}


def recipe(method, **sizes):
    """A method's recipe with FP16 salient channels; W_down is rounded plainly, because no method here changes it."""
    return rosaq.load_recipe(METHODS[method]).replace(down_scaling="none", **sizes)


def medians(errors, name="output"):
    """Median over blocks of one error, by role."""
    return {role: statistics.median(getattr(error, name) for error in errors if error.role == role) for role in ROLES}


def ratio(above, below):
    """Geometric mean over the layers of above / below."""
    pairs = [(a.output, b.output) for a, b in zip(above, below, strict=True) if a.role in ROLES]
    return statistics.geometric_mean(a / b for a, b in pairs)


class Study:
    """One model with its calibration, as every question below needs it."""

    def __init__(self, arguments):
        """Measure the activations once."""
        self.device, self.every = resolve_device(arguments.device), arguments.every
        source = rosaq.open_source(arguments.model)
        self.source = dataclasses.replace(source, tensors={name: source.tensors[name] for name in source.tensors})
        self.sizes = {"bits": 3, "group_size": arguments.group_size, "salient": arguments.salient, "salient_per_head": arguments.salient_per_head}
        self.calibration = rosaq.Calibration(arguments.calibration, arguments.samples, arguments.seq_len)
        self.statistics, self.observed = self.see(self.calibration)

    def see(self, calibration):
        """Statistics and observation of a text."""
        found = rosaq.measure(self.source, calibration, self.device)
        return found, list(observe(self.source, found, self.device, no_progress))

    def errors(self, method, source=None, statistics=None, observed=None, **sizes):
        """Errors of each layer."""
        wanted = recipe(method, **{**self.sizes, **sizes})
        return recipe_errors(source or self.source, wanted, statistics or self.statistics, observed or self.observed, self.device, self.every)

    def compare(self, **changes):
        """ROSAQ's error over Mixed's, for some change of sizes, text or source."""
        return ratio(self.errors("rosaq", **changes), self.errors("mixed", **changes))

    def channels(self):
        """Outlier figures of every site and block in every basis."""
        heads = self.source.architecture.heads
        top = {"attn_out": (self.sizes["salient_per_head"], heads)}
        return [
            {
                site: {basis: outliers(view, *top.get(site, (self.sizes["salient"], 1))).to_dict() for basis, view in block[site].views.items()}
                for site in SITES
            }
            for block in self.observed
        ]

    def explained(self):
        """Measured ratio of each layer of attn_in and mlp_in beside the one that energy and weight error predict.

        A rounding error spread evenly over the channels that are rounded loses |dW|^2 (energy left in them) / (their number), so
        the ratio is that of |dW| times that of the square root of the energy left.
        """
        rows, rosaq_errors, mixed_errors = [], self.errors("rosaq"), self.errors("mixed")
        for turned, mixed in zip(rosaq_errors, mixed_errors, strict=True):
            site = next(site for site, roles in SITES.items() if turned.role in roles)
            if site not in SITE_NORM:
                continue
            block, views = self.source.block(turned.block), self.observed[turned.block][site].views
            weight, gain = block[f"{LINEARS[turned.role]}.weight"], block[f"{NORMS[SITE_NORM[site]]}.weight"]
            own, other = views["own"], views["global"]
            kept = own.magnitude.argsort(descending=True)[: self.sizes["salient"]]
            left = {"mixed": own.energy.sum() - own.energy[kept].sum(), "rosaq": other.energy[self.sizes["salient"] :].sum()}
            lost = {"mixed": mixed.weight * weight.norm(), "rosaq": turned.weight * (weight * gain).norm()}
            energy, rounding = float((left["rosaq"] / left["mixed"]).sqrt()), float(lost["rosaq"] / lost["mixed"])
            rows.append(
                {"block": turned.block, "role": turned.role, "measured": turned.output / mixed.output, "predicted": energy * rounding,
                 "energy": energy, "rounding": rounding}
            )  # fmt: skip
        return rows

    def queries(self):
        """Energy in the leading channels of the heads of attn_out: axes shared by a group of query heads, and each head's own."""
        a, top, rows = self.source.architecture, self.sizes["salient_per_head"], []
        for block in self.observed:
            moment = block["attn_out"].moment.view(a.heads, a.head_size, a.heads, a.head_size).double()
            heads = torch.stack([moment[head, :, head] for head in range(a.heads)])
            pooled = heads.view(a.kv_heads, -1, a.head_size, a.head_size).mean(1)
            shared = principal_basis(pooled)[0][..., :top].repeat_interleave(a.heads // a.kv_heads, 0)
            within = torch.einsum("hea,hef,hfa->", shared, heads, shared)
            plain = heads.diagonal(dim1=1, dim2=2).sort(descending=True).values[:, :top].sum()
            own = principal_basis(heads)[1][:, :top].sum()
            rows.append([float(part / heads.diagonal(dim1=1, dim2=2).sum()) for part in (plain, within, own)])
        return [statistics.median(column) for column in zip(*rows, strict=True)]


def synthetic(directions, share, aligned, salient=64, width=512):
    """ROSAQ's error over Mixed's for Gaussian weights and inputs with `share` of their energy in some planted directions.

    Args:
        directions: how many there are.
        share: of the energy.
        aligned: whether they are channels, or directions that no channel is near.
        salient: channels kept.
        width: of the layer, inputs and outputs.
    """
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(width, width, generator=generator, dtype=torch.float64)
    values = torch.cat([torch.full((directions,), share / directions), torch.full((width - directions,), (1 - share) / (width - directions))])
    axes = torch.linalg.qr(torch.randn(width, width, generator=generator, dtype=torch.float64))[0]
    axes = torch.eye(width, dtype=torch.float64) if aligned else axes
    moment = axes * values.double() @ axes.T
    layout = LinearLayout(width, width, bits=3, group_size=64, salient=salient)

    def error(basis):
        turned, energies = weight @ basis, basis.T @ moment @ basis
        rounded = turned.clone()
        rounded[:, salient:] = round_to_nearest(turned[:, salient:], layout)
        return relative_errors(turned, rounded, energies)[1]

    order = salient_first(moment.diagonal().sqrt(), salient)
    return error(principal_basis(moment)[0]) / error(torch.eye(width, dtype=torch.float64)[:, order])


def study(arguments):
    """Everything, as one JSON-able dict."""
    run = Study(arguments)
    base = {method: run.errors(method) for method in METHODS}
    hidden = run.source.architecture.hidden
    found = {
        "model": run.source.name, "calibration": run.statistics.record, "sizes": run.sizes, "every": run.every,
        "channels": run.channels(),
        "errors": {method: [vars(error) for error in errors] for method, errors in base.items()},
        "median errors": {method: medians(errors) for method, errors in base.items()},
        "ratio": {"global": ratio(base["rosaq"], base["mixed"]), "per-layer": ratio(base["per-layer"], base["mixed"])},
        "explained": run.explained(),
        "by bits": {bits: run.compare(bits=bits) for bits in (3, 4)},
        "by K": {k: run.compare(salient=k) for k in (8, 16, 32, 64, 128, 256) if k < hidden},
        "by group": {group: run.compare(group_size=group) for group in (32, 64, 128)},
        "heads, energy in the top": dict(zip(("channels", "axes shared by a group", "axes of each query head"), run.queries(), strict=True)),
        "by planted spread": {spread: run.compare(source=planted(run.source, spread)) for spread in (0.25, 0.5, 1.0, 2.0)},
    }  # fmt: skip
    if arguments.other:
        other, seen = run.see(dataclasses.replace(run.calibration, text=arguments.other))
        found["other text"] = {
            "calibrated and measured on it": run.compare(statistics=other, observed=seen),
            "calibrated on the first, measured on it": run.compare(observed=seen),
        }
    return found


def plot(found, file):
    """Four panels: ratio against depth, predicted against measured, dependence on K, synthetic outliers."""
    figure = require_matplotlib()(figsize=(15, 3.6), layout="constrained")
    depth, fit, sizes, planted = figure.subplots(1, 4)
    for role in ROLES:
        pairs = [[error for error in found["errors"][method] if error["role"] == role] for method in ("rosaq", "mixed")]
        depth.plot([a["block"] for a in pairs[0]], [a["output"] / b["output"] for a, b in zip(*pairs, strict=True)], marker=".", label=role)
    depth.axhline(1, color="#999", linewidth=0.8)
    depth.set(xlabel="block", ylabel="output error, ROSAQ / Mixed", title=Path(found["model"]).name[:32])
    depth.legend(fontsize="x-small")
    fit.plot([row["predicted"] for row in found["explained"]], [row["measured"] for row in found["explained"]], ".")
    fit.axline((1, 1), slope=1, color="#999", linewidth=0.8)
    fit.set(xlabel="predicted from energy and |dW|", ylabel="measured ratio", title="q, k, v, gate, up")
    sizes.plot(list(map(int, found["by K"])), list(found["by K"].values()), marker="o", label="this model")
    sizes.set(xlabel="salient channels K", ylabel="ratio", title="dependence on K", xscale="log")
    for aligned in (True, False):
        rows = [row for row in found["synthetic"] if row["aligned"] == aligned and row["directions"] == 16]
        label = "in channels" if aligned else "between channels"
        planted.plot([row["share"] for row in rows], [row["ratio"] for row in rows], marker="o", label=label)
    planted.set(xlabel="energy in 16 planted directions", ylabel="ratio", title="synthetic, K = 64")
    planted.legend(fontsize="small")
    figure.savefig(file, dpi=110)


def show(found):
    """The tables."""
    roles = [[method, *(f"{value:.4f}" for value in values.values())] for method, values in found["median errors"].items()]
    show_table("output error, median over blocks", ["method", *ROLES], roles)
    bases = []
    for site in SITES:
        for basis in found["channels"][0][site]:
            values = [block[site][basis] for block in found["channels"]]
            bases.append([f"{site}, {basis}", *(f"{statistics.median(value[name] for value in values):.3f}" for name in values[0])])
    show_table("inputs, median over blocks", ["site, basis", "kurtosis", "max / median", "energy in the top"], bases)
    rows = [[f"ROSAQ {name} / Mixed", f"{value:.3f}"] for name, value in found["ratio"].items()]
    for part in ("by bits", "by K", "by group", "by planted spread", "other text"):
        rows += [[f"{part}: {key}", f"{value:.3f}"] for key, value in found.get(part, {}).items()]
    fit = found["explained"]
    for name in ("measured", "predicted", "energy", "rounding"):
        rows.append([f"q, k, v, gate, up: {name}", f"{statistics.geometric_mean(row[name] for row in fit):.3f}"])
    agreement = statistics.correlation([row["predicted"] for row in fit], [row["measured"] for row in fit])
    rows.append(["correlation of predicted and measured", f"{agreement:.3f}"])
    rows += [[f"heads, energy: {key}", f"{value:.3f}"] for key, value in found["heads, energy in the top"].items()]
    rows += [[f"synthetic: {r['directions']} directions, share {r['share']}, {'in' if r['aligned'] else 'between'} channels", f"{r['ratio']:.3f}"]
             for r in found["synthetic"]]  # fmt: skip
    show_table("ratio of output errors, geometric mean", ["", ""], rows)


def main():
    """Measure, write, show."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("calibration", help="text file")
    parser.add_argument("-o", "--output", type=Path, required=True)
    parser.add_argument("--other", help="another text, to calibrate on one and measure on the other")
    parser.add_argument("--samples", type=int, default=16)
    parser.add_argument("--seq-len", type=int, default=512)
    parser.add_argument("--every", type=int, default=5, help="look at the errors of every so many blocks")
    parser.add_argument("--group-size", type=int, default=64)
    parser.add_argument("--salient", type=int, default=64)
    parser.add_argument("--salient-per-head", type=int, default=16)
    parser.add_argument("--device", default="auto")
    arguments = parser.parse_args()
    found = study(arguments)
    found["synthetic"] = [
        {"directions": directions, "share": share, "aligned": aligned, "ratio": synthetic(directions, share, aligned)}
        for aligned in (True, False) for directions in (4, 16, 64, 128) for share in (0.2, 0.5, 0.8, 0.95)
    ]  # fmt: skip
    arguments.output.mkdir(parents=True, exist_ok=True)
    (arguments.output / "rotation_or_magnitude.json").write_text(json.dumps(found) + "\n")
    plot(found, arguments.output / "rotation_or_magnitude.png")
    show(found)
    results.print(f"{arguments.output}/rotation_or_magnitude.json, .png", highlight=False)


if __name__ == "__main__":
    main()
