"""The grid per group: nearest codes, groups and heads that do not mix, widths that the group size does not divide."""

from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rosaq.kernels.reference import dequantize
from rosaq.layout import LinearLayout, code_step
from rosaq.rounding.clipping import fit_shrunk_grid, shrunk_grids
from rosaq.rounding.grid import fit_grid, grouped, round_to_nearest, to_codes, ungrouped
from rosaq.rounding.linear import quantize_linear


def weight(n, k, seed=0):
    return torch.randn(n, k, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_codes_are_the_nearest_of_the_grid(bits):
    layout = LinearLayout(6, 64, bits, 32)
    w = weight(6, 64)
    got = dequantize(layout, quantize_linear(w, layout))
    scale, zero = fit_grid(grouped(w, layout), bits)
    levels = (torch.arange(1 << bits) - zero[..., None]) * scale[..., None]  # (N, G, 2^b)
    nearest = (grouped(w, layout)[..., None] - levels[:, :, None]).abs().min(-1).values
    assert torch.allclose((grouped(got, layout) - grouped(w, layout)).abs(), nearest, atol=1e-6)
    assert bool(((got - w).abs() <= 0.5001 * scale.repeat_interleave(32, 1)).all())


@settings(max_examples=40, deadline=None)
@given(
    bits=st.sampled_from([2, 3, 4, 8]), group=st.sampled_from([16, 32, 64, 128]), blocks=st.integers(1, 4), size=st.integers(17, 150),
    salient=st.integers(0, 16), salient_bits=st.sampled_from([8, 16]), seed=st.integers(0, 9),
)  # fmt: skip
def test_stored_is_what_rounding_says(bits, group, blocks, size, salient, salient_bits, seed):
    layout = LinearLayout(5, blocks * size, bits, group, blocks, salient, salient_bits)
    w = weight(5, blocks * size, seed)
    stored = quantize_linear(w, layout)
    forms = layout.tensors()
    assert {name: (tuple(t.shape), t.dtype) for name, t in stored.items()} == forms
    assert sum(t.numel() * t.itemsize * 8 for t in stored.values()) == layout.bits_stored()
    got, columns = dequantize(layout, stored), layout.quantized_columns()
    assert torch.allclose(got[:, columns], round_to_nearest(w[:, columns], layout), atol=1e-6)
    error = (got - w)[:, layout.salient_columns()].abs()
    bound = w.abs().amax(1, keepdim=True) * (1e-3 if salient_bits == 16 else 0.51 / 127 + 1e-3)
    assert bool((error <= bound).all())


def test_a_group_never_crosses_a_head():
    layout = LinearLayout(2, 2 * 48, 4, 64, blocks=2, salient=16)
    assert layout.groups == 2 and layout.column_groups().tolist() == [0] * 32 + [1] * 32
    w = weight(2, 96)
    before = quantize_linear(w, layout)["scales"]
    w[:, 48:] *= 1000  # the other head
    after = quantize_linear(w, layout)["scales"]
    assert torch.equal(before[:, 0], after[:, 0]) and not torch.equal(before[:, 1], after[:, 1])


@pytest.mark.parametrize(("width", "group", "last"), [(576, 128, 64), (896, 128, 128), (1000, 128, 104), (1000, 64, 40)])
def test_last_group_is_shorter_where_the_width_does_not_divide(width, group, last):
    layout = LinearLayout(4, width, 4, group)
    lengths = torch.bincount(layout.column_groups())
    assert lengths[:-1].unique().tolist() == [group] and int(lengths[-1]) == last
    w = weight(4, width)
    assert torch.equal(ungrouped(grouped(w, layout), layout), w)
    one = w[:, -last:]  # the last group is rounded as if it stood alone
    assert torch.equal(round_to_nearest(w, layout)[:, -last:], round_to_nearest(one, LinearLayout(4, last, 4, last)))


@pytest.mark.parametrize("form", [dict(), dict(salient=24), dict(blocks=4, salient=4), dict(blocks=4, group_size=20)])
def test_slices_of_groups_are_the_groups_in_order(form):
    layout = LinearLayout(4, 96, 4, **{"group_size": 32, **form})
    owners = [group for group, own in enumerate(layout.group_slices()) for _ in range(own.start, own.stop)]
    assert owners == layout.column_groups().tolist() and len(layout.group_slices()) == layout.groups
    assert layout.group_slices()[0].start == 0 and all(a.stop == b.start for a, b in pairwise(layout.group_slices()))


def test_order_puts_salient_columns_first_and_is_undone():
    layout = LinearLayout(3, 40, 4, 16, salient=8, ordered=True)
    w = weight(3, 40)
    order = torch.randperm(40, generator=torch.Generator().manual_seed(2))
    got = dequantize(layout, quantize_linear(w, layout, order))
    assert torch.allclose(got[:, order[:8]], w[:, order[:8]], atol=1e-3)
    assert float((got - w).abs().max()) < 0.5


def test_groups_of_zeros_and_constants_are_exact():
    layout = LinearLayout(3, 32, 4, 16)
    w = torch.zeros(3, 32)
    w[1], w[2, 16:] = 0.75, -2.0
    assert torch.allclose(round_to_nearest(w, layout), w, atol=1e-3)
    assert torch.equal(dequantize(layout, quantize_linear(w, layout))[0], w[0])


def test_tiny_and_huge_weights():
    layout = LinearLayout(1, 16, 4, 16)
    tiny = dequantize(layout, quantize_linear(torch.full((1, 16), 1e-12), layout))
    assert torch.isfinite(tiny).all() and float(tiny.abs().max()) < 1e-6
    with pytest.raises(ValueError, match=r"spans .* more than an FP16 scale"):
        quantize_linear(torch.linspace(-1e6, 1e6, 16).view(1, 16), layout)


@pytest.mark.parametrize(
    ("form", "message"),
    [
        (dict(bits=5), "bits is 5; allowed are"),
        (dict(group_size=0), "group_size is 0"),
        (dict(blocks=7), "64 input channels do not form 7 equal blocks"),
        (dict(salient=64), "64 salient channels of a block of 64"),
        (dict(salient_bits=4), "salient_bits is 4; allowed are"),
    ],
)
def test_impossible_layouts_are_refused(form, message):
    with pytest.raises(ValueError, match=message):
        LinearLayout(**{**dict(out_features=4, in_features=64, bits=4, group_size=32), **form})


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_the_searched_grid_is_the_best_of_those_tried(bits):
    """At 2 bits zero moves by quarters of a step, too."""
    w, counts = weight(40, 64).view(40, 2, 32), torch.rand(2, 32, generator=torch.Generator().manual_seed(1))

    def lost(scale, zero):
        error = (to_codes(w, scale, zero, bits) - zero[..., None]) * scale[..., None] - w
        return (error.square() * counts).sum(-1)

    step = code_step(bits)
    whole, middle = fit_grid(w, bits)
    top = (1 << bits) - 1
    tried = [lost(step * (share * whole / step).half().float(), (middle + moved).clamp(0, top)) for share, moved in shrunk_grids(bits)]
    scale, zero = fit_shrunk_grid(w, counts, bits)
    assert torch.allclose(lost(scale, zero), torch.stack(tried).amin(0), rtol=1e-4)
    fixed = torch.stack([loss for loss, (_, moved) in zip(tried, shrunk_grids(bits), strict=True) if not moved]).amin(0)
    assert bool((zero != middle).any()) == (float(lost(scale, zero).sum()) < 0.99 * float(fixed.sum())) == (bits == 2)
