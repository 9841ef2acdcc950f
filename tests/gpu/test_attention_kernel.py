"""Decoding attention on the GPU agrees with float64, also out of a CUDA graph whose lengths have changed."""

import importlib.util
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

from attention_cases import CASES, LENGTHS, PIECES, check, step

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available() or importlib.util.find_spec("triton") is None, reason="needs a GPU and Triton"),
]


LONG = (700, 1, 0, 2049, 128, 5000)


@pytest.mark.parametrize("lengths", [LENGTHS, PIECES, LONG, (0, 8000), (0, *range(1, 400))], ids=["short", "pieces", "long", "one", "many"])
@pytest.mark.parametrize("case", list(CASES))
def test_agrees_with_float64(case, lengths):
    from rosaq.kernels.attention import attend, workspace

    (q, cache, table, counts, *scales), expected = step(case, "cuda", lengths)
    out = torch.full(expected.shape, float("nan"), dtype=q.dtype, device="cuda")
    attend(q, out, cache, table, counts, *scales)
    check(case, out, expected, lengths)
    captured = counts.clone().fill_(1)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        attend(q, out, cache, table, captured, *scales)
    captured.copy_(counts)
    for _ in range(20):
        out.fill_(float("nan"))
        graph.replay()
        check(case, out, expected, lengths)
    assert not workspace(out.device)[-1].any()  # the pieces were all counted
