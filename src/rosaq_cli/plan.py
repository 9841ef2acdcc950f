"""`rosaq quantize --plan`: what a run will take, shown instead of running."""

from typing import TYPE_CHECKING

from rosaq_cli.screen import errors, show_json, show_table

if TYPE_CHECKING:  # loading it takes seconds, which `rosaq --help` must not
    from rosaq.forecast import Forecast
    from rosaq.run import Report

PLACES = {"device": "on the device", "host": "in host memory", "disk": "on disk"}


def show_plan(plan: "Forecast", as_json: bool = False) -> None:
    """JSON, or a table on standard output and a line on standard error for whatever will not fit."""
    if as_json:
        return show_json(plan.to_dict())
    rows = [
        ["weights", f"{plan.parameters / 1e6:,.1f} million, {_gigabytes(plan.original_bytes)} in FP16"],
        *size_rows(plan),
        ["activations", f"{_gibibytes(plan.activations_bytes)}, {PLACES[plan.activations]}"],
        ["host memory", f"about {_gibibytes(plan.host_bytes)} of {_gibibytes(plan.host_available_bytes)}"],
    ]
    if plan.device_bytes:
        rows.append(["device memory", f"about {_gibibytes(plan.device_bytes)} of {_gibibytes(plan.device_available_bytes)}"])
    rows.append(["disk", f"{_gigabytes(plan.disk_bytes)} of {_gigabytes(plan.disk_available_bytes)}"])
    stages = ", ".join(f"{stage} {_duration(seconds)}" for stage, seconds in plan.seconds.items() if seconds >= 0.01 * sum(plan.seconds.values()))
    rows.append(["time", f"about {_duration(sum(plan.seconds.values()))} on one device: {stages}"])
    rows.append(["estimated from", f"{plan.rates.describe()}, measured now on {plan.device}; a download is not counted"])
    show_table(f"{plan.model}: plan for {plan.recipe}, nothing was written", ["", "planned"], rows)
    for what, needed, there in (
        ("host memory", plan.host_bytes, plan.host_available_bytes),
        ("device memory", plan.device_bytes, plan.device_available_bytes),
        ("disk", plan.disk_bytes, plan.disk_available_bytes),
    ):
        if needed > there:
            errors.print(f"{what}: about {_gibibytes(needed)} are needed, {_gibibytes(there)} are there", style="yellow", highlight=False)


def size_rows(said: "Forecast | Report") -> list[list[str]]:
    """Rows of a table: bits per weight, and the checkpoint's size."""
    smaller = f"{said.original_bytes / said.checkpoint_bytes:.2f} times smaller than FP16"
    return [["bits per weight", f"{said.bits_per_weight:.3f}"], ["checkpoint", f"{_gigabytes(said.checkpoint_bytes)}, {smaller}"]]


def _gigabytes(size: int) -> str:
    return f"{size / 1e9:,.2f} GB" if size >= 1e9 else f"{size / 1e6:,.1f} MB"


def _gibibytes(size: int) -> str:
    return f"{size / 2**30:,.2f} GiB"


def _duration(seconds: float) -> str:
    for unit, length in (("hours", 3600), ("minutes", 60)):
        if seconds >= 2 * length:
            return f"{seconds / length:.1f} {unit}"
    return f"{seconds:.1f} s"
