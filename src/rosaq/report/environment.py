"""What each measurement ran on, as far as it was recorded."""

from collections.abc import Iterator

from rosaq.report.reading import Evidence, Found
from rosaq.report.summary import quantized

Ran = tuple[str, str]  # the measurement; machine and versions
TOLD = ("device", "torch", "transformers", "vllm")  # of the details of a row of `benchmark decode`


def environment(evidence: Evidence) -> list[Ran]:
    """One row for each measurement and machine."""
    kinds = {"comparison": _compared, "decoding": _decoded, "quantizing": _timed, "kernels": _kernels, "evaluation": _evaluated}
    rows = [row for kind, told in kinds.items() for one in evidence.of(kind) for row in told(one)]
    devices = {"cpu": "CPU", "cuda": "CUDA GPU"}
    rows += [(f"quantize: {model.name}", devices.get(model.report["device"], model.report["device"])) for model in quantized(evidence)]
    return list(dict.fromkeys(rows))


def _compared(one: Found) -> Iterator[Ran]:
    for run in (run for _, values in one.cells for run in values["runs"]):
        hardware = run["hardware"]
        machine = hardware.get("gpu") or f"CPU {hardware['machine']}, {hardware['threads']} of {hardware['cores']} threads"
        software = ", ".join(f"{name} {version}" for name, version in run["versions"].items() if version != "not installed")
        yield f"compare: {one.name}", f"{machine}; {software}"


def _decoded(one: Found) -> Iterator[Ran]:
    for row in one.data["rows"]:
        told = {name: row["details"][name] for name in TOLD if name in row["details"]}
        yield f"benchmark decode: {one.name}", "; ".join(str(value) if name == "device" else f"{name} {value}" for name, value in told.items())


def _timed(one: Found) -> Iterator[Ran]:
    yield f"benchmark quantize: {one.name}", f"{one.data['ranks']} x {one.data['hardware']}"


def _kernels(one: Found) -> Iterator[Ran]:
    if "hardware" in one.data:
        yield f"benchmark kernels: {one.name}", f"{one.data['hardware']}; torch {one.data['torch']}"


def _evaluated(one: Found) -> Iterator[Ran]:
    yield f"evaluate: {one.name}", f"{one.data['device'].replace('cpu', 'CPU')}, {one.data['dtype']}"
