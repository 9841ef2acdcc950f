"""Imports go one way: a file imports only files of a lower level. One table holds the order of the whole package."""

import ast
from pathlib import Path

SRC = Path(__file__).resolve().parents[1] / "src"
# Level of each module; a sub-package counts as its files. What is not listed fails.
LEVELS = {
    "rosaq.version": 0, "rosaq.layout": 0, "rosaq.packing": 0, "rosaq.recipe": 0, "rosaq.architecture": 0, "rosaq.clock": 0, "rosaq.device": 0,
    "rosaq.distributed": 0, "rosaq.safetensors_folder": 0, "rosaq.text_files": 0, "rosaq.hadamard": 0,
    "rosaq.kernels.reference": 1, "rosaq.gguf_file": 1, "rosaq.rotation": 1, "rosaq.calibration": 1, "rosaq.saliency": 1, "rosaq.embedding": 1,
    "rosaq.norm": 1, "rosaq.plan": 1, "rosaq.rounding": 1, "rosaq.evaluation": 1, "rosaq.memory": 1, "rosaq.activations": 1,
    "rosaq.new_folders": 0, "rosaq.shard_files": 1, "rosaq.workfolder": 1, "rosaq.provenance": 1, "rosaq.channel_picture": 1,
    "rosaq.source": 2,
    "rosaq.kernels": 2,
    "rosaq.skeleton": 3, "rosaq.checkpoint": 3, "rosaq.checkpoint_writer": 4, "rosaq.card": 3, "rosaq.linear": 3, "rosaq.results": 3,
    "rosaq.rates": 3,
    "rosaq.moments": 4, "rosaq.engines": 4, "rosaq.hadamard_linear": 4,
    "rosaq.basis": 5, "rosaq.learned": 5, "rosaq.engines.transformers": 5,
    "rosaq.statistics": 6, "rosaq.sensitivity": 6, "rosaq.engines.loading": 6, "rosaq.engines.dummy": 6, "rosaq.engines.serving": 6,
    "rosaq.engines.vllm_layers": 7, "rosaq.engines.vllm_attention": 7, "rosaq.engines.export": 7,
    "rosaq.run": 7, "rosaq.job": 8, "rosaq.benchmark": 7, "rosaq.verification": 7, "rosaq.engines.vllm": 8,
    "rosaq.allocation": 9, "rosaq.pipeline": 10, "rosaq.stage_times": 10, "rosaq.forecast": 11, "rosaq.inspection": 9, "rosaq.distillation": 8,
    "rosaq.benchmark.quantizing": 11, "rosaq.curve": 10, "rosaq.comparison": 11,
    "rosaq": 12, "rosaq.report": 12,
    "rosaq_cli": 13,
    "rosaq.__main__": 14,
}  # fmt: skip
# The two halves share the recipe, the layout and the checkpoint, nothing else.
SERVING = (
    "rosaq.kernels",
    "rosaq.linear",
    "rosaq.hadamard_linear",
    "rosaq.embedding",
    "rosaq.norm",
    "rosaq.engines.transformers",
    "rosaq.engines.vllm",
    "rosaq.engines.vllm_layers",
    "rosaq.engines.vllm_attention",
    "rosaq.engines.export",
    "rosaq.engines.serving",
    "rosaq.engines",
)
CALIBRATING = (
    "rosaq.calibration",
    "rosaq.moments",
    "rosaq.statistics",
    "rosaq.basis",
    "rosaq.rotation",
    "rosaq.rounding",
    "rosaq.learned",
    "rosaq.sensitivity",
    "rosaq.allocation",
    "rosaq.job",
    "rosaq.pipeline",
)


def module_name(path: Path) -> str:
    return ".".join(path.relative_to(SRC).with_suffix("").parts).removesuffix(".__init__")


def unit(module: str) -> str:
    """The entry of LEVELS that a module belongs to: itself, or the nearest package above it that is listed."""
    while module not in LEVELS and "." in module:
        module = module.rpartition(".")[0]
    return module


def imported(path: Path) -> set[str]:
    modules = {module_name(file) for file in SRC.rglob("*.py")}
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= {name if name in modules else node.module for name in names}
    return {name for name in found if name.partition(".")[0] in ("rosaq", "rosaq_cli")}


def edges():
    for path in SRC.rglob("*.py"):
        for target in imported(path):
            yield module_name(path), target


def test_every_module_has_a_level():
    for path in SRC.rglob("*.py"):
        name = module_name(path)
        assert unit(name) in LEVELS and (unit(name) != "rosaq" or name == "rosaq"), f"{name} is not in the table of levels"


def test_imports_go_down():
    upward = [
        f"{source} imports {target}" for source, target in edges() if unit(source) != unit(target) and LEVELS[unit(target)] >= LEVELS[unit(source)]
    ]
    assert upward == []


def test_serving_loads_no_calibration_code():
    wrong = [f"{source} imports {target}" for source, target in edges() if unit(source) in SERVING and unit(target) in CALIBRATING]
    assert wrong == []


def test_files_and_functions_stay_small():
    long, root = [], SRC.parent
    for path in (file for folder in ("src", "tests", "scripts", "examples") for file in (root / folder).rglob("*.py")):
        text = path.read_text()
        if len(text.splitlines()) > 400:
            long.append(f"{path.name}: {len(text.splitlines())} lines")
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef) and node.end_lineno - node.lineno + 1 > 60:
                long.append(f"{path.name}: {node.name} has {node.end_lineno - node.lineno + 1} lines")
    assert long == []
