"""A picture of how a rotation was learned, out of a checkpoint's report (needs the extra `plots`)."""

from pathlib import Path

from rosaq.checkpoint import MANIFEST
from rosaq.inspection.plots import require_matplotlib
from rosaq.safetensors_folder import read_json


def plot_learning(checkpoints: list[str | Path], file: str | Path) -> None:
    """Draw the loss of every learning step, and the loss on windows that were not learned from, before and after.

    Args:
        checkpoints: folders of checkpoints with a learned rotation; one line each.
        file: picture to write; its ending says which kind (.png, .svg, .pdf).

    Raises:
        ValueError: a checkpoint has no learned rotation, or matplotlib is missing.
    """
    curves = {}
    for folder in checkpoints:
        learning = read_json(Path(folder) / MANIFEST).get("report", {}).get("learning")
        if not learning:
            raise ValueError(f"{folder}: its rotation was not learned, so there is no loss to draw")
        curves[Path(folder).name] = learning
    figure = require_matplotlib()(figsize=(8, 5), layout="constrained")
    axes = figure.subplots()
    for name, learning in curves.items():
        steps = len(learning["losses"])
        (line,) = axes.plot(range(steps), learning["losses"], linewidth=1, alpha=0.6, label=f"{name}: its batch")
        ends = [learning["held_out_before"], learning["held_out_after"]]
        axes.plot([0, steps], ends, "o--", color=line.get_color(), label=f"{name}: text kept aside")
    axes.set(xlabel="step of Cayley SGD", ylabel="loss of the rounded model, nats per token")
    axes.legend()
    figure.savefig(file)
