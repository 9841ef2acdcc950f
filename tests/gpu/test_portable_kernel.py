"""The Triton kernel agrees with the float64 reference."""

import importlib.util

import pytest
import torch

from rosaq import kernels
from rosaq.benchmark.kernels import random_tensors
from rosaq.kernels import portable, reference
from rosaq.layout import LinearLayout
from rosaq.linear import RosaqLinear

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available() or importlib.util.find_spec("triton") is None, reason="needs a GPU and Triton"),
]
LAYOUTS = {
    "prefix": LinearLayout(264, 1024, 4, 128, salient=128),
    "heads, 3 bits": LinearLayout(576, 576, 3, 64, blocks=9, salient=16, bias=True),
    "2 bits, heads": LinearLayout(576, 576, 2, 64, blocks=9, salient=16, bias=True),
    "2 bits, odd sizes": LinearLayout(100, 200, 2, 48, blocks=2, salient=4, salient_bits=8),
    "ordered, 8-bit salient": LinearLayout(1000, 1024, 4, 128, salient=64, salient_bits=8, bias=True, ordered=True),
    "8 bits": LinearLayout(999, 576, 8, 64),
}


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=list(LAYOUTS))
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_agrees_with_float64(layout: LinearLayout, dtype: torch.dtype) -> None:
    tensors = random_tensors(layout, "cuda")
    prepared = portable.prepare(layout, tensors, dtype)
    for tokens in (0, 1, 3, 16, 17, 64, 100):
        x = torch.randn(tokens, layout.in_features, device="cuda").to(dtype)
        y = portable.run(x, prepared)
        assert y.shape == (tokens, layout.out_features) and y.dtype == dtype
        if tokens:
            expected = reference.matmul(x.double(), layout, tensors)
            assert (y.double() - expected).norm() / expected.norm() < (2e-3 if dtype == torch.float16 else 1.2e-2)


def test_strides_graphs_and_compilation() -> None:
    layout = LAYOUTS["heads, 3 bits"]
    layer = RosaqLinear(layout, "cuda")
    layer.allow_kernels(("triton",))
    layer.load_state_dict(random_tensors(layout, "cuda"))
    wide = torch.randn(4, 2 * 576, device="cuda", dtype=torch.float16)
    x = wide[:, ::2]
    expected = layer(x.contiguous())
    assert torch.equal(layer(x), expected)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = layer(x)
    graph.replay()
    assert torch.equal(y, expected)
    assert torch.equal(torch.compile(layer, fullgraph=True)(x), expected)


def test_is_chosen_where_the_fused_kernels_cannot_run() -> None:
    assert kernels.choose(LAYOUTS["prefix"], torch.device("cuda"), torch.bfloat16, ("triton", "dequantized")) is portable
