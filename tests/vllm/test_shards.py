"""Cutting stored layers over ranks and joining several into one keeps their product; nothing here needs vLLM."""

import pytest
import torch

from rosaq.engines.shards import Shard, input_parts, join
from rosaq.kernels.reference import dequantize
from rosaq.layout import LinearLayout

CPU = torch.device("cpu")


def stored(layout, seed=0):
    """Random tensors of a layer; every bit pattern of codes and zero points is a valid one."""
    generator = torch.Generator().manual_seed(seed)
    found = {}
    for name, (shape, dtype) in layout.tensors().items():
        if name == "order":
            found[name] = torch.randperm(layout.in_features, generator=generator).to(dtype)
        elif dtype.is_floating_point:
            found[name] = (torch.rand(shape, generator=generator) + 0.1).to(dtype)
        else:
            low, high = (-128, 128) if dtype == torch.int8 else (-(2**31), 2**31)
            found[name] = torch.randint(low, high, shape, generator=generator).to(dtype)
    return found


def filled(shard, tensors):
    for name, tensor in tensors.items():
        shard.take(name, tensor, CPU)
    return shard


def weight(layout, tensors):
    return dequantize(layout, tensors, torch.float64)


PREFIX = dict(group_size=16, salient=16)
FORMS = {
    "int4": dict(bits=4, **PREFIX),
    "int3": dict(bits=3, **PREFIX),
    "int2": dict(bits=2, **PREFIX),
    "int8-salient": dict(bits=4, salient_bits=8, **PREFIX),
    "table": dict(bits=8, group_size=16),
    "ordered": dict(bits=4, ordered=True, **PREFIX),
}


@pytest.mark.parametrize("form", list(FORMS))
@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_joined_shares_of_outputs_are_the_rows_of_the_whole(form, ranks):
    """Shares of 30, 15 and 10 outputs, none a multiple of the 8 or 4 zero points of a word; k and v go to ranks in copies."""
    layouts = [LinearLayout(30, 48, **FORMS[form]), LinearLayout(15, 48, **FORMS[form])]
    tensors = [stored(layout, seed) for seed, layout in enumerate(layouts)]
    if "order" in tensors[0]:
        tensors[1]["order"] = tensors[0]["order"]
    whole = [weight(layout, tensor) for layout, tensor in zip(layouts, tensors, strict=True)]
    for rank in range(ranks):
        rows = [range(rank * 30 // ranks, (rank + 1) * 30 // ranks), range(15)]
        shards = [filled(Shard(f"layer{i}", layout, mine, len(mine)), tensors[i]) for i, (layout, mine) in enumerate(zip(layouts, rows, strict=True))]
        layout, joined = join(shards)
        assert {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in joined.items()} == layout.tensors()
        expected = torch.cat([part[mine.start : mine.stop] for part, mine in zip(whole, rows, strict=True)])
        assert torch.equal(weight(layout, joined), expected)
        assert not shards[0].tensors


@pytest.mark.parametrize("form", [dict(bits=4), dict(bits=3), dict(bits=2)])
@pytest.mark.parametrize(("blocks", "salient", "parts"), [(6, 4, 2), (6, 4, 3), (6, 0, 6), (1, 0, 3), (1, 0, 6), (1, 16, 3), (1, 32, 2)])
@pytest.mark.parametrize("salient_bits", [8, 16])
def test_shares_of_inputs_are_columns_of_the_whole(form, blocks, salient, parts, salient_bits):
    """Heads of 16 channels of which 12 are quantized, so that 3-bit shares begin within a word; groups of 16 otherwise."""
    form = {**form, "salient_bits": salient_bits}
    layout = LinearLayout(10, 96, group_size=16, blocks=blocks, salient=salient, **form)
    tensors = stored(layout)
    expected = weight(layout, tensors).chunk(parts, dim=1)
    for part in range(parts):
        shard = filled(Shard("layer", layout, range(10), 10, part, parts), tensors)
        assert torch.equal(weight(*join([shard])), expected[part])


def test_padding_of_a_vocabulary_computes_zero():
    layout = LinearLayout(13, 32, 8, 16)
    tensors = stored(layout)
    shard = filled(Shard("lm_head", layout, range(8, 13), 8), tensors)
    got = weight(*join([shard]))
    assert torch.equal(got[:5], weight(layout, tensors)[8:])
    assert not got[5:].any()


@pytest.mark.parametrize(
    ("layout", "allowed"),
    [
        (LinearLayout(8, 96, 4, 16, blocks=6, salient=4), [1, 2, 3, 6]),
        (LinearLayout(8, 96, 4, 16), [1, 2, 3, 6]),
        (LinearLayout(8, 96, 4, 64), [1]),
        (LinearLayout(8, 96, 4, 16, salient=16), [1, 2, 3]),
        (LinearLayout(8, 96, 4, 16, salient=8), [1]),
        (LinearLayout(8, 96, 4, 16, ordered=True), [1]),
    ],
)
def test_a_size_that_does_not_divide_is_refused_with_those_that_do(layout, allowed):
    assert input_parts(layout) == allowed
    with pytest.raises(
        ValueError, match=rf"down: .* cannot be cut into 4 parts; tensor parallel sizes that divide it are {', '.join(map(str, allowed))}$"
    ):
        Shard("down", layout, range(8), 8, 0, 4)


def test_what_does_not_fit_is_named():
    layout = LinearLayout(10, 32, 4, 16)
    tensors = stored(layout)
    shard = Shard("m.up_proj", layout, range(10), 10)
    with pytest.raises(ValueError, match=r"tensor 'm.up_proj.salient' is unknown"):
        shard.take("salient", tensors["scales"], CPU)
    with pytest.raises(ValueError, match=r"tensor 'm.up_proj.scales' has shape \(9, 2\)"):
        shard.take("scales", tensors["scales"][1:], CPU)
    with pytest.raises(ValueError, match=r"tensor 'm.up_proj.scales' has .* type torch.float32; the format asks for .* torch.float16"):
        shard.take("scales", tensors["scales"].float(), CPU)
    shard.take("qweight", tensors["qweight"], CPU)
    shard.take("zeros", tensors["zeros"], CPU)
    with pytest.raises(ValueError, match=r"tensor 'm.up_proj.scales' is missing"):
        join([shard])


def test_layers_that_gather_differently_are_not_joined():
    layout = LinearLayout(8, 48, **FORMS["ordered"])
    shards = [filled(Shard(name, layout, range(8), 8), stored(layout, seed)) for seed, name in enumerate(("q", "k"))]
    with pytest.raises(ValueError, match="k and q gather their inputs in different orders"):
        join(shards)
