"""Decoding attention in Triton's interpreter, which runs kernels on the CPU."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = """
import torch
from attention_cases import CASES, LENGTHS, check, interpret, spoil, step
interpret()
from rosaq.kernels.attention import attend, workspace
shared = workspace(torch.device("cpu"))
for case in [name for name in CASES if name != "groups, bfloat16"]:
    for lengths, cut in ((LENGTHS, False), ((1, 600, 0, 300, 129), True)):
        spoil(*shared)
        arguments, expected = step(case, "cpu", lengths)
        out = torch.full(expected.shape, float("nan"), dtype=arguments[0].dtype)
        attend(arguments[0], out, *arguments[1:])
        check(case, out, expected)
        assert bool(shared[1].isfinite().any()) == cut, case  # that pieces were written is what is tested
spoil(*shared)
"""


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs Triton")
def test_agrees_with_float64() -> None:
    path = os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": path}
    done = subprocess.run([sys.executable, "-c", PROGRAM], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs Triton")
def test_pieces_fill_the_gpu_and_no_more() -> None:
    """What a launch has to hold: pieces in the workspace, and no more programs than run at once where sequences are few."""
    from rosaq.kernels.attention import MOST, PIECES, ROOM, cut

    for programs in (1, 3, 8, 32, 64, 192, 256, 448, 512, 700, 4096):
        for members in (1, 4, 8, 71):
            parts, least = cut(programs, members, 128, 396, 128)
            assert 1 <= parts <= MOST and (parts == 1 or (programs * parts <= PIECES and programs * parts * members * 128 <= ROOM))
            if 2 * programs <= 396:
                assert programs * parts <= 396 and least == 128
    assert cut(512, 4, 128, 396, 128) == (3, 512)  # four rounds of a third instead of two whole ones
