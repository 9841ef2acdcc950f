"""The wheel holds everything that the installed package needs, and works away from the checkout."""

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def unpacked(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wheel")
    build = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--wheel-dir", str(folder), str(ROOT)]
    subprocess.run(build, check=True, capture_output=True)
    with zipfile.ZipFile(next(folder.glob("rosaq-*.whl"))) as wheel:
        wheel.extractall(folder / "site")
    return folder / "site"


def test_data_files_are_in_it(unpacked):
    source = ROOT / "src"
    wanted = {
        path.relative_to(source)
        for name in ("*.py", "*.toml", "*.cu", "*.cuh", "py.typed")
        for path in source.rglob(name)
        if "__pycache__" not in path.parts
    }
    assert {path.relative_to(unpacked) for path in unpacked.rglob("*") if path.is_file()} >= wanted
    assert any(path.suffix == ".cu" for path in wanted) and Path("rosaq/recipes/rosaq-int4.toml") in wanted
    metadata = next(unpacked.glob("rosaq-*.dist-info/METADATA")).read_text()
    assert "License-Expression: Apache-2.0" in metadata and "Requires-Python: >=3.11" in metadata


def test_it_runs_from_where_it_is_installed(unpacked, tmp_path):
    code = f"import rosaq; assert rosaq.__file__.startswith({str(unpacked)!r}), rosaq.__file__; print(*rosaq.shipped_recipes())"
    environment = {**os.environ, "PYTHONPATH": str(unpacked)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=tmp_path, env=environment)
    assert "rosaq-paper" in done.stdout.split()
