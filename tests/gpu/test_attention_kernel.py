"""Decoding attention on the GPU agrees with float64, also out of a CUDA graph whose lengths have changed."""

import importlib.util
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

from attention_cases import CASES, LENGTHS, check, step

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available() or importlib.util.find_spec("triton") is None, reason="needs a GPU and Triton"),
]


@pytest.mark.parametrize("case", list(CASES))
def test_agrees_with_float64(case):
    from rosaq.kernels.attention import attend

    (q, cache, table, lengths, *scales), expected = step(case, "cuda")
    out = torch.full(expected.shape, float("nan"), dtype=q.dtype, device="cuda")
    attend(q, out, cache, table, lengths, *scales)
    check(case, out, expected)
    captured = lengths.clone().fill_(1)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        attend(q, out, cache, table, captured, *scales)
    captured.copy_(torch.tensor(LENGTHS))
    graph.replay()
    check(case, out, expected)
