"""The CUDA kernels agree with the float64 reference, on every size that the format allows, and in every way PyTorch may call them."""

import itertools

import pytest
import torch

from rosaq import kernels
from rosaq.benchmark.kernels import llama2_7b, llama3_8b, random_tensors
from rosaq.kernels import build, cuda, reference, shapes, stream
from rosaq.layout import LinearLayout
from rosaq.linear import RosaqLinear

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0), reason="needs a Hopper GPU (compute capability 9.0)"
    ),
]
TOKENS = (0, 1, 2, 3, 5, 8, 15, 16, 17, 31, 33, 64, 100, 128, 257, 1024)
TYPES = (torch.float16, torch.bfloat16)
TOLERANCE = {torch.float16: 2e-3, torch.bfloat16: 1.2e-2}  # relative, Frobenius: a few roundings of the type
LAYOUTS = {
    "heads of 128": LinearLayout(512, 1024, 4, 128, blocks=8, salient=32),
    "heads of 128, 3 bits": LinearLayout(512, 1024, 3, 128, blocks=8, salient=32),
    "heads of 128, 2 bits": LinearLayout(512, 1024, 2, 128, blocks=8, salient=32, salient_bits=8),
    "heads of 64": LinearLayout(576, 576, 3, 64, blocks=9, salient=16, bias=True),
    "2 bits, odd sizes": LinearLayout(100, 200, 2, 48, blocks=2, salient=4, salient_bits=8),
    "ordered, 8-bit salient": LinearLayout(1000, 1024, 4, 128, salient=64, salient_bits=8, bias=True, ordered=True),
    "no salient channels": LinearLayout(256, 11008, 4, 128),
    "one output": LinearLayout(1, 576, 4, 64, salient=64, salient_bits=8),
    "lm_head": LinearLayout(4999, 576, 8, 64),
}


@pytest.fixture(scope="module", autouse=True)
def libraries() -> None:
    """Build side by side what the tests would build one after another."""
    build.build_all([(bits, runs, bf16) for bits in (2, 3, 4, 8) for runs in (1, 2, 3, 4) for bf16 in (0, 1)])


def agree(layout: LinearLayout, dtype: torch.dtype, tokens: int) -> None:
    """One product against float64, the memory that the output gets poisoned first."""
    tensors = random_tensors(layout, "cuda")
    prepared = cuda.prepare(layout, tensors, dtype)
    x = torch.randn(tokens, layout.in_features, device="cuda").to(dtype)
    torch.full((tokens, layout.out_features), float("nan"), device="cuda", dtype=dtype)
    y = cuda.run(x, prepared)
    assert y.shape == (tokens, layout.out_features) and y.dtype == dtype
    if tokens:
        expected = reference.matmul(x.double(), layout, tensors)
        assert (y.double() - expected).norm() / expected.norm() < TOLERANCE[dtype]


@pytest.mark.parametrize(("bits", "group_size", "dtype"), list(itertools.product((2, 3, 4, 8), (32, 64, 128), TYPES)))
@pytest.mark.parametrize("tokens", TOKENS)
def test_bits_groups_and_types(bits: int, group_size: int, dtype: torch.dtype, tokens: int) -> None:
    agree(LinearLayout(264, 1024, bits, group_size, salient=128), dtype, tokens)


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=list(LAYOUTS))
@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("tokens", TOKENS)
def test_layouts(layout: LinearLayout, dtype: torch.dtype, tokens: int) -> None:
    agree(layout, dtype, tokens)


@pytest.mark.parametrize(
    "layout",
    [LinearLayout(400, 2048, 4, 128, blocks=16, salient=32), *(LinearLayout(400, 2048, bits, 128, salient=128) for bits in (3, 2))],
)
@pytest.mark.parametrize("tokens", [1, 13, 16, 64])
def test_many_ways_to_cut_a_launch_give_the_same_product(layout: LinearLayout, tokens: int) -> None:
    tensors = random_tensors(layout, "cuda")
    prepared = cuda.prepare(layout, tensors, torch.float16)
    x = torch.randn(tokens, 2048, device="cuda", dtype=torch.float16)
    expected = reference.matmul(x.double(), layout, tensors)
    ways = (shapes.decode_shapes if tokens <= shapes.DECODE_TOKENS else shapes.batch_shapes)(prepared.form, tokens)
    for shape in ways[:: 5 if tokens <= shapes.DECODE_TOKENS else 1]:
        y = torch.full((tokens, 400), float("nan"), device="cuda", dtype=torch.float16)
        cuda.launch(x, y, prepared.weights, prepared.form, shape)
        assert (y.double() - expected).norm() / expected.norm() < TOLERANCE[torch.float16], shape


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("name", [*llama2_7b(), "llama3 down"])
@pytest.mark.parametrize(("bits", "group_size"), list(itertools.product((2, 3, 4), (32, 64))))
def test_small_groups_at_sizes_whose_cuts_were_measured_with_groups_of_128(bits: int, group_size: int, name: str, dtype: torch.dtype) -> None:
    layout = {**llama2_7b(bits, group_size), **llama3_8b(bits, group_size)}[name]
    tensors = random_tensors(layout, "cuda")
    prepared = cuda.prepare(layout, tensors, dtype)
    weight = reference.dequantize(layout, tensors, torch.float64)
    for tokens in (1, 8, 16, 32, 64, 128):
        x = torch.randn(tokens, layout.in_features, device="cuda").to(dtype)
        torch.full((tokens, layout.out_features), float("nan"), device="cuda", dtype=dtype)
        expected = x.double() @ weight.T
        assert (cuda.run(x, prepared).double() - expected).norm() / expected.norm() < TOLERANCE[dtype], tokens


def layer_of(layout: LinearLayout, device: str = "cuda") -> RosaqLinear:
    layer = RosaqLinear(layout, device)
    layer.allow_kernels(("cuda", "dequantized"))
    layer.load_state_dict(random_tensors(layout, device))
    return layer


def test_choice_takes_the_kernel_for_half_types_only() -> None:
    layout, device = LAYOUTS["heads of 128"], torch.device("cuda")
    assert kernels.choose(layout, device, torch.bfloat16, ("cuda",)) is cuda
    assert kernels.choose(layout, device, torch.float32).NAME == "dequantized"


@pytest.mark.parametrize("tokens", [1, 5, 40, 300])
def test_results_do_not_change_from_run_to_run(tokens: int) -> None:
    layer = layer_of(LinearLayout(4096, 4096, 4, 128, blocks=32, salient=32))
    x = torch.randn(tokens, 4096, device="cuda", dtype=torch.float16)
    first = layer(x)
    assert all(torch.equal(layer(x), first) for _ in range(20))


@pytest.mark.parametrize("tokens", [1, 7, 50, 600])
def test_any_stride(tokens: int) -> None:
    layer = layer_of(LAYOUTS["heads of 128"])
    wide = torch.randn(tokens, 2 * 1024 + 24, device="cuda", dtype=torch.float16)
    for x in (wide[:, 8:1032], wide[:, 1:1025], wide[:, : 2 * 1024 : 2], wide[:, :1024].t().contiguous().t(), wide[:1, :1024].expand(tokens, 1024)):
        assert torch.equal(layer(x), layer(x.contiguous()))


@pytest.mark.parametrize("tokens", [1, 40, 600])
def test_cuda_graph_and_second_stream(tokens: int) -> None:
    layer = layer_of(LAYOUTS["heads of 64"])
    x = torch.randn(tokens, 576, device="cuda", dtype=torch.bfloat16)
    expected = layer(x)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        assert torch.equal(layer(x), expected)
    torch.cuda.synchronize()
    graph, buffer = torch.cuda.CUDAGraph(), torch.zeros_like(x)
    with torch.cuda.graph(graph):
        y = layer(layer(buffer + 0))
    buffer.copy_(x)
    graph.replay()
    assert torch.equal(y, layer(expected))


def test_compiles_as_one_operation() -> None:
    layer = layer_of(LAYOUTS["heads of 64"])
    layer.repack(torch.float16)
    x = torch.randn(4, 576, device="cuda", dtype=torch.float16)
    compiled = torch.compile(lambda v: layer(v * 2) + 1, fullgraph=True)
    assert torch.allclose(compiled(x), layer(x * 2) + 1, rtol=1e-2, atol=1e-2)
    prepared = cuda.prepare(layer.layout, layer.tensors(), torch.float16)
    arguments = (x, prepared.stream, prepared.salient_scales, prepared.bias, prepared.gather, list(cuda.astuple(prepared.form)))
    torch.library.opcheck(torch.ops.rosaq.cuda_matmul.default, arguments, test_utils=("test_schema", "test_faketensor"))


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize("tokens", [1, 40, 600])
def test_second_gpu(tokens: int) -> None:
    layer = layer_of(LAYOUTS["heads of 128"])
    x = torch.randn(tokens, 1024, device="cuda", dtype=torch.float16)
    expected = layer(x)
    other = layer.to("cuda:1")
    assert torch.equal(other(x.to("cuda:1")).cpu(), expected.cpu())


def test_repacking_needs_little_scratch_memory_and_repeats_itself() -> None:
    layout = LinearLayout(22016, 4096, 4, 128, salient=128)
    tensors = random_tensors(layout, "cuda")
    form, _, runs = stream.plan(layout)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    first = stream.repack(layout, tensors, form, runs, torch.float16)
    assert torch.cuda.max_memory_allocated() - before < first.numel() + 8 * stream.CHUNK_BYTES
    assert torch.equal(stream.repack(layout, tensors, form, runs, torch.float16), first)
