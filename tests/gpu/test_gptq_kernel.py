"""GPTQ's Triton kernel rounds as its loop does."""

import importlib.util
from unittest import mock

import pytest
import torch

from rosaq.kernels.reference import dequantize
from rosaq.layout import LinearLayout
from rosaq.rounding import columns
from rosaq.rounding.linear import Rounding, quantize_linear

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available() or importlib.util.find_spec("triton") is None, reason="needs a GPU and Triton"),
]
LAYOUTS = {
    "plain": LinearLayout(1536, 576, 4, 64),
    "wide groups": LinearLayout(999, 1024, 3, 256),
    "heads": LinearLayout(576, 576, 3, 64, blocks=9, salient=16),
    "ragged": LinearLayout(100, 200, 2, 48, blocks=2, salient=4, salient_bits=8),
}


@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=list(LAYOUTS))
def test_loses_what_the_loop_loses(layout: LinearLayout, act_order: bool) -> None:
    """A last bit of an error can change a code, and that one those after it: nearly all codes are the same, and the loss is."""
    k, generator = layout.in_features, torch.Generator("cuda").manual_seed(0)
    mix = torch.randn(k, k, device="cuda", generator=generator)
    x = torch.randn(4000, k, device="cuda", generator=generator) @ mix / k**0.5
    moment, weight = x.T @ x / len(x), torch.randn(layout.out_features, k, device="cuda", generator=generator)
    assert columns.fits_kernel(weight, layout.group_size)
    ours = quantize_linear(weight, layout, None, moment, Rounding(gptq=True, act_order=act_order))
    with mock.patch.object(columns, "fits_kernel", return_value=False):
        looped = quantize_linear(weight, layout, None, moment, Rounding(gptq=True, act_order=act_order))
    got, wanted = dequantize(layout, ours), dequantize(layout, looped)
    assert float((got != wanted).float().mean()) < 0.02
    loss, wanted_loss = (float((((q - weight) @ moment) * (q - weight)).sum()) for q in (got, wanted))
    assert abs(loss / wanted_loss - 1) < 1e-3
    again = quantize_linear(weight, layout, None, moment, Rounding(gptq=True, act_order=act_order))
    assert all(torch.equal(ours[name], again[name]) for name in ours)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_rounds_on_a_gpu_that_is_not_the_current_one() -> None:
    layout, generator = LAYOUTS["plain"], torch.Generator().manual_seed(0)
    weight = torch.randn(layout.out_features, layout.in_features, generator=generator)
    moment = torch.eye(layout.in_features) + 0.1
    first, second = (quantize_linear(weight.to(gpu), layout, None, moment.to(gpu), Rounding(gptq=True)) for gpu in ("cuda:0", "cuda:1"))
    assert all(torch.equal(first[name].cpu(), second[name].cpu()) for name in first)
