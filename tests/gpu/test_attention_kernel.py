"""Decoding attention on the GPU agrees with float64, also out of a CUDA graph whose lengths have changed."""

import importlib.util
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

from attention_cases import CASES, LENGTHS, LONG, check, in_float64, spoil, step

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available() or importlib.util.find_spec("triton") is None, reason="needs a GPU and Triton"),
]


@pytest.mark.parametrize("lengths", [LENGTHS, LONG, (0, 8000), (0, *range(1, 400))], ids=["short", "long", "one", "many"])
@pytest.mark.parametrize("case", list(CASES))
def test_agrees_with_float64(case, lengths):
    from rosaq.kernels.attention import attend, workspace

    (q, cache, table, count, *scales), expected = step(case, "cuda", lengths)
    out = torch.full(expected.shape, float("nan"), dtype=q.dtype, device="cuda")
    spoil(*workspace(out.device))
    attend(q, out, cache, table, count, *scales)
    check(case, out, expected)
    captured = count.clone().fill_(1)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        attend(q, out, cache, table, captured, *scales)
    half = tuple(n // 2 for n in lengths)
    for again in (lengths, lengths[::-1], half, lengths):  # the counters have to be back at zero each time
        captured.copy_(torch.tensor(again))
        spoil(*workspace(out.device))
        out.fill_(float("nan"))
        graph.replay()
        check(case, out, in_float64((q, cache, table, captured, *scales)))
    spoil(*workspace(out.device))


@pytest.mark.parametrize(("heads", "key_heads", "sequences"), [(8, 8, 3), (32, 8, 5), (7, 1, 40)])
def test_many_pieces_end_in_any_order(heads, key_heads, sequences):
    """The result does not depend on which piece ends last."""
    from rosaq.kernels.attention import attend, workspace

    generator = torch.Generator("cuda").manual_seed(1)
    q = torch.randn(sequences, heads, 128, device="cuda", generator=generator).half()
    cache = torch.randn(64, 2, 16, key_heads, 128, device="cuda", generator=generator).half()
    table = torch.randint(0, 64, (sequences, 512), device="cuda", generator=generator, dtype=torch.int32)
    count = torch.randint(1, 512 * 16, (sequences,), device="cuda", generator=generator, dtype=torch.int32)
    one, first, out = torch.ones((), device="cuda"), torch.empty_like(q), torch.empty_like(q)
    attend(q, first, cache, table, count, 0.1, one, one)
    check("many", first, in_float64((q, cache, table, count, 0.1, one, one)))
    for _ in range(200):
        attend(q, out, cache, table, count, 0.1, one, one)
        assert torch.equal(out, first)
    assert not workspace(out.device)[-1].any()
