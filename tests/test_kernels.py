"""The CPU kernels agree with the reference; the choice among kernels says why; `RosaqLinear` keeps the checkpoint's form."""

import copy
import importlib.util
import io
import itertools
import os
import subprocess
import sys

import pytest
import torch

from rosaq import kernels
from rosaq.benchmark.kernels import llama2_7b, llama3_8b
from rosaq.engines.dummy import random_tensors
from rosaq.kernels import build, cpu, cuda, dequantized, measured, reference, shapes, stream
from rosaq.layout import LinearLayout
from rosaq.linear import RosaqLinear

LAYOUTS = {
    "plain": LinearLayout(64, 256, 4, 64),
    "salient prefix": LinearLayout(48, 192, 4, 64, salient=64, bias=True),
    "heads, shorter groups": LinearLayout(72, 576, 3, 64, blocks=9, salient=16, bias=True),
    "heads, 8-bit salient": LinearLayout(64, 512, 4, 128, blocks=4, salient=32, salient_bits=8),
    "ordered, ragged outputs": LinearLayout(100, 576, 4, 64, salient=64, salient_bits=8, bias=True, ordered=True),
    "2 bits, heads": LinearLayout(72, 576, 2, 64, blocks=9, salient=16, bias=True),
    "2 bits, 8-bit salient": LinearLayout(64, 512, 2, 128, salient=32, salient_bits=8),
    "odd sizes": LinearLayout(50, 200, 2, 48, blocks=2, salient=4, salient_bits=8),
    "8 bits": LinearLayout(64, 576, 8, 64),
    "one wide group": LinearLayout(32, 96, 3, 1000, salient=32),
}
every_layout = pytest.mark.parametrize("layout", LAYOUTS.values(), ids=list(LAYOUTS))


def relative(actual: torch.Tensor, expected: torch.Tensor) -> float:
    return float((actual.double() - expected).norm() / expected.norm())


@every_layout
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_dequantized_weight_equals_the_reference(layout: LinearLayout, dtype: torch.dtype) -> None:
    tensors = random_tensors(layout, "cpu")
    assert torch.equal(dequantized.dequantize(layout, tensors, dtype), reference.dequantize(layout, tensors, dtype))


def test_the_cuda_kernels_refuse_a_layer_that_their_batch_kernel_cannot_cut(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(build, "why_not", lambda *form: None)
    for channels in (48, 128, 192, 256):
        layout = LinearLayout(64, channels, 8, 64)
        form, _, _ = stream.plan(layout)
        refused = cuda.why_not(layout, torch.device("cuda", 0), torch.float16)
        assert (refused is None) == bool(shapes.batch_shapes(form, 17)), channels
        assert refused is None or f"{channels} input channels are one item" in refused
    assert refused is None


@every_layout
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("tokens", [0, 1, 3, 17, 130])
def test_matmul_agrees_with_float64(layout: LinearLayout, dtype: torch.dtype, tokens: int) -> None:
    tensors = random_tensors(layout, "cpu")
    x = torch.randn(tokens, layout.in_features, generator=torch.Generator().manual_seed(1)).to(dtype)
    y = kernels.matmul(x, layout, tensors)
    assert y.shape == (tokens, layout.out_features) and y.dtype == dtype
    if tokens:
        expected = reference.matmul(x.double(), layout, tensors)
        assert relative(y, expected) < (1e-5 if dtype == torch.float32 else 1e-2)


def test_any_stride_and_any_number_of_dimensions() -> None:
    layout = LAYOUTS["salient prefix"]
    tensors = random_tensors(layout, "cpu")
    x = torch.randn(2, 3, 2 * layout.in_features).bfloat16()[..., ::2]
    y = kernels.matmul(x, layout, tensors)
    assert y.shape == (2, 3, layout.out_features)
    assert torch.equal(y, kernels.matmul(x.contiguous(), layout, tensors))


def test_choice_follows_type_and_device_and_names_every_reason() -> None:
    layout, device = LAYOUTS["plain"], torch.device("cpu")
    assert kernels.choose(layout, device, torch.bfloat16) is cpu
    assert kernels.choose(layout, device, torch.float32) is dequantized
    assert kernels.reasons(layout, device, torch.float32).keys() == {"cuda", "triton", "cpu", "dequantized"}
    with pytest.raises(ValueError, match=r"cuda: the device is cpu.*cpu: activations are torch.float32"):
        kernels.choose(layout, device, torch.float32, ["cuda", "cpu"])
    with pytest.raises(ValueError, match="unknown kernels"):
        kernels.choose(layout, device, torch.float32, ["marlin"])
    with pytest.raises(ValueError, match="not floating point"):
        kernels.choose(layout, device, torch.int8)


def test_state_dict_is_the_checkpoint_and_survives_a_round_trip() -> None:
    layout = LAYOUTS["heads, shorter groups"]
    tensors = random_tensors(layout, "cpu")
    layer = RosaqLinear(layout, "meta")
    assert all(buffer.is_meta for buffer in layer.buffers())
    with pytest.raises(ValueError, match="meta device"):
        layer.tensors()
    layer = layer.to_empty(device="cpu")
    layer.load_state_dict(tensors)
    x = torch.randn(2, layout.in_features).bfloat16()
    before = layer(x)
    state = layer.state_dict()
    assert {name: (tuple(t.shape), t.dtype) for name, t in state.items()} == layout.tensors()
    assert all(torch.equal(state[name], tensors[name]) for name in tensors)
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    other = RosaqLinear(layout)
    other.load_state_dict(torch.load(file))
    assert torch.equal(other(x), before)
    assert torch.equal(copy.deepcopy(layer)(x), before)


def test_prepared_weights_follow_new_values_and_types_stay() -> None:
    layout = LAYOUTS["plain"]
    layer = RosaqLinear(layout)
    x = torch.randn(2, layout.in_features).bfloat16()
    for seed in (1, 2):
        tensors = random_tensors(layout, "cpu", seed)
        layer.load_state_dict(tensors)
        assert torch.equal(layer(x), kernels.matmul(x, layout, tensors))
    layer.scales = tensors["scales"] * 2  # as loaders do
    assert torch.equal(layer(x), kernels.matmul(x, layout, {**tensors, "scales": tensors["scales"] * 2}))
    layer.to(torch.bfloat16)
    assert layer.scales.dtype == torch.float16 and layer.qweight.dtype == torch.int32


def test_repack_can_drop_the_stored_tensors() -> None:
    layout = LAYOUTS["plain"]
    layer = RosaqLinear(layout)
    layer.load_state_dict(random_tensors(layout, "cpu"))
    x = torch.randn(2, layout.in_features).bfloat16()
    expected = layer(x)
    assert layer.repack(torch.bfloat16, free=True) == "cpu"
    assert not list(layer.buffers()) and torch.equal(layer(x), expected)
    with pytest.raises(ValueError, match="dropped by repack"):
        layer(x.half())


def test_allowed_kernels_are_obeyed() -> None:
    layout = LAYOUTS["plain"]
    layer = RosaqLinear(layout)
    layer.load_state_dict(random_tensors(layout, "cpu"))
    layer.allow_kernels(["dequantized"])
    assert layer.repack(torch.bfloat16) == "dequantized"
    layer.allow_kernels(["cuda"])
    with pytest.raises(ValueError, match="the device is cpu"):
        layer(torch.randn(1, layout.in_features).bfloat16())


def test_compiles_without_graph_breaks() -> None:
    layout = LAYOUTS["salient prefix"]
    layer = RosaqLinear(layout)
    layer.load_state_dict(random_tensors(layout, "cpu"))
    layer.repack(torch.bfloat16)
    x = torch.randn(2, layout.in_features).bfloat16()
    compiled = torch.compile(layer, backend="eager", fullgraph=True)
    assert torch.equal(compiled(x), layer(x))


@every_layout
def test_stream_of_the_cuda_kernels_has_the_planned_size(layout: LinearLayout) -> None:
    tensors = {name: tensor for name, tensor in random_tensors(layout, "cpu").items() if name != "order"}
    plain = cuda._unordered(layout)
    form, gather, runs = stream.plan(plain)
    packed = stream.repack(plain, tensors, form, runs, torch.float16)
    assert packed.shape == (form.stream_bytes,) and form.salient_offset % 128 == 0 == form.code_bytes % 128
    assert gather is None or len(gather) == form.columns
    for tokens in (1, 16, 17, 300):
        shape = shapes.choose(form, tokens, 132)
        assert shape.sizes.tokens == tokens


def test_measured_cuts_are_ways_to_cut_the_layers_that_they_name() -> None:
    layers = [layout for bits in (4, 3, 2) for model in (llama2_7b, llama3_8b) for layout in model(bits).values()]
    forms = {(f.bits, f.group_runs, f.tiles, f.q_items, f.s_items): f for f in (stream.plan(layout)[0] for layout in layers)}
    for (*layer, tokens), cut in measured.CUTS.items():
        assert shapes.choose(forms[tuple(layer)], tokens, measured.MULTIPROCESSORS).cut == cut
    assert {key[:5] for key in measured.CUTS} == set(forms)


def test_a_layer_with_other_salient_channels_is_cut_like_the_measured_one() -> None:
    """W_down was measured without salient channels, and the recommended recipe keeps 128 of them."""
    for channels in (11008, 14336):
        plain, split = (stream.plan(LinearLayout(4096, channels, 4, 128, salient=salient, salient_bits=8))[0] for salient in (0, 128))
        for tokens in (1, 16, 64, 128):
            assert shapes.choose(split, tokens, measured.MULTIPROCESSORS).cut == shapes.choose(plain, tokens, measured.MULTIPROCESSORS).cut


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_a_layer_with_other_groups_is_cut_like_the_measured_one(bits: int) -> None:
    for name, layout in llama2_7b(bits).items():
        if name != "llama2 o":  # whose heads come in other items
            coarse, fine = (stream.plan(form)[0] for form in (layout, llama2_7b(bits, 64)[name]))
            for tokens in (1, 64, 128):
                assert shapes.choose(fine, tokens, measured.MULTIPROCESSORS).cut == shapes.choose(coarse, tokens, measured.MULTIPROCESSORS).cut


def test_four_bit_stream_holds_each_code_where_the_kernel_reads_it() -> None:
    layout = LinearLayout(16, 128, 4, 128)
    tensors = random_tensors(layout, "cpu")
    form, _, runs = stream.plan(layout)
    words = stream.repack(layout, tensors, form, runs, torch.float16)[:1024].contiguous().view(torch.int32).view(2, 32, 4)
    codes = reference.unpack(tensors["qweight"], 4, 128)
    for unit, lane, step, pair, e in [(0, 0, 0, 0, 0), (1, 5, 2, 1, 1), (0, 31, 3, 3, 0), (1, 18, 1, 2, 1)]:
        g, t = divmod(lane, 4)
        channel = 64 * unit + 16 * step + 8 * (pair >> 1) + 2 * t + e
        code = (int(words[unit, lane, step]) >> (4 * pair + 16 * e)) & 15
        assert code == int(codes[g + 8 * (pair & 1), channel])


def test_two_bit_stream_holds_each_code_where_the_kernel_reads_it() -> None:
    layout = LinearLayout(16, 128, 2, 128)
    tensors = random_tensors(layout, "cpu")
    form, _, runs = stream.plan(layout)
    assert form.code_bytes == 512
    words = stream.repack(layout, tensors, form, runs, torch.float16)[:512].contiguous().view(torch.int32).view(32, 2, 2).tolist()
    codes = reference.unpack(tensors["qweight"], 2, 128)
    for unit, lane, step, pair, e in itertools.product(range(2), range(32), range(4), range(4), range(2)):
        g, t = divmod(lane, 4)
        code = (words[lane][unit][step // 2] >> ((8 * (step % 2) + 2 * pair + 2) % 16 + 16 * e)) & 3
        assert code == int(codes[g + 8 * (pair & 1), 64 * unit + 16 * step + 8 * (pair >> 1) + 2 * t + e])


def test_three_bit_stream_holds_each_code_where_the_kernel_reads_it() -> None:
    layout = LinearLayout(16, 128, 3, 128)
    tensors = random_tensors(layout, "cpu")
    form, _, runs = stream.plan(layout)
    flat = stream.repack(layout, tensors, form, runs, torch.float16)[: form.code_bytes].contiguous().view(torch.int32)
    words = torch.cat((flat[:128].view(32, 4), flat[128:].view(32, 2)), dim=1).view(32, 2, 3).tolist()  # planes of four words and of two
    codes = reference.unpack(tensors["qweight"], 3, 128)
    places = {pair: (word, 3 * at) for word, held in enumerate(stream.THREE_BIT_PAIRS) for at, pair in enumerate(held)}
    for unit, lane, pair, e in itertools.product(range(2), range(32), range(16), range(2)):
        (g, t), (step, p) = divmod(lane, 4), divmod(pair, 4)
        if pair < 15:
            word, bit = places[pair]
            code = (words[lane][unit][word] >> (bit + 16 * e)) & 7
        else:
            code = sum(((words[lane][unit][k] >> (15 + 16 * e)) & 1) << k for k in range(3))
        assert code == int(codes[g + 8 * (p & 1), 64 * unit + 16 * step + 8 * (p >> 1) + 2 * t + e])


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs Triton")
def test_triton_kernel_agrees_in_triton_s_interpreter() -> None:
    """In a process of its own, since Triton reads the variable when it is imported. Its interpreter has no bfloat16 products."""
    program = """
import torch
from rosaq.benchmark.kernels import random_tensors
from rosaq.kernels import choose, portable, reference
from rosaq.layout import LinearLayout
for layout in (
    LinearLayout(36, 160, 3, 64, blocks=2, salient=16, bias=True), LinearLayout(36, 160, 2, 64, blocks=2, salient=16),
    LinearLayout(33, 96, 4, 32, salient=32, salient_bits=8, ordered=True),
):
    tensors = random_tensors(layout, "cpu")
    assert choose(layout, torch.device("cpu"), torch.float16, ("triton",)) is portable
    prepared = portable.prepare(layout, tensors, torch.float16)
    for tokens in (0, 17):
        x = torch.randn(tokens, 2 * layout.in_features).half()[:, ::2]
        y, expected = portable.run(x, prepared), reference.matmul(x.double(), layout, tensors)
        assert y.shape == expected.shape and bool((y.double() - expected).norm() <= 2e-3 * expected.norm()), layout
"""
    environment = {**os.environ, "TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_library_names_change_with_the_sources_and_constants() -> None:
    names = {build.cached(bits, runs, bf16).name for bits in (2, 3, 4, 8) for runs in (1, 2, 3, 4) for bf16 in (0, 1)}
    assert len(names) == 32
