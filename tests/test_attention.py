"""Decoding attention in Triton's interpreter, which runs kernels on the CPU."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = """
import torch
from attention_cases import CASES, LENGTHS, PIECES, check, interpret, step
interpret()
from rosaq.kernels.attention import attend, workspace
for case, lengths in [(case, lengths) for lengths in (LENGTHS, PIECES) for case in CASES]:
    arguments, expected = step(case, "cpu", lengths)
    out = torch.full(expected.shape, float("nan"), dtype=arguments[0].dtype)
    attend(arguments[0], out, *arguments[1:])
    check(case, out, expected, lengths)
    assert not workspace(out.device)[-1].any(), "a counter was left"
"""


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs Triton")
def test_agrees_with_float64() -> None:
    path = os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": path}
    done = subprocess.run([sys.executable, "-c", PROGRAM], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
