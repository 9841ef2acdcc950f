"""The fused CUDA kernels for Hopper (sm_90a): one launch per layer, salient and quantized part together.

Up to 16 tokens `csrc/decode.cuh` runs, up to `PREFILL_TOKENS` `csrc/batch.cuh`, above that the weight is dequantized (`csrc/dequantize.cuh`)
and multiplied by cuBLAS. Weights are repacked once per layer (`stream.py`).
The libraries are built with nvcc at first use, one per (bits, runs per scale, type of x), and kept in the user's cache folder.
Results do not change from run to run: all sums have a fixed order.
"""

import ctypes
from collections.abc import Callable, Mapping
from dataclasses import astuple, dataclass, field
from functools import cached_property, lru_cache
from typing import Any, ClassVar

import torch

from rosaq.kernels import build, shapes, stream
from rosaq.kernels.stream import Form
from rosaq.layout import LinearLayout

NAME = "cuda"
PREFILL_TOKENS = 1024  # measured, docs/log.md: there the two take the same time
_TYPES = {torch.float16: 0, torch.bfloat16: 1}


class _Weights(ctypes.Structure):
    """`Weights` of csrc/format.cuh."""

    _fields_: ClassVar[list[tuple[str, Any]]] = [(name, ctypes.c_void_p) for name in ("stream", "salient_scales", "bias")]
    _fields_ += [(name, ctypes.c_int64) for name in ("scales_offset", "salient_offset")]
    _fields_ += [
        (name, ctypes.c_int32)
        for name in (
            "out_features", "tiles", "q_items", "s_items", "s_item_bytes", "blocks", "block_size", "q_runs_per_block", "q_valid",
            "q_offset", "s_runs_per_block", "s_valid", "s_offset",
        )
    ]  # fmt: skip


@dataclass(frozen=True)
class Prepared:
    """One repacked layer."""

    form: Form
    stream: torch.Tensor  # (stream_bytes,) uint8
    salient_scales: torch.Tensor | None  # (16 T,) float16
    bias: torch.Tensor | None  # (N,) in the type of x
    gather: torch.Tensor | None  # positions in x, K reading a zero; None: x is read where it lies
    launches: dict[int, "Launch"] = field(default_factory=dict, compare=False)  # by number of tokens

    @cached_property
    def weights(self) -> _Weights:
        """The kernels' argument, made once: outside of a captured graph, a step of one token waits for Python."""
        return _weights(self, self.form)

    @cached_property
    def boxed(self) -> tuple[Form, torch.Tensor, _Weights] | None:
        """Form, gather and argument for the batch kernel, where it cannot read x as it lies."""
        if stream.boxable(self.form):
            return None
        form, gather = _boxed(self.form, self.stream.device)
        return form, gather, _weights(self, form)


@dataclass(frozen=True)
class Launch:
    """All that is known of a launch before x: outside of a captured graph, a step of few tokens waits for Python."""

    library: ctypes.CDLL
    function: Callable[..., int]
    weights: Any  # reference to the kernels' argument
    shape: shapes.Shape
    columns: int
    gather: torch.Tensor | None = None  # for the batch kernel, where it cannot read x as it lies

    @classmethod
    def of(cls, form: Form, weights: _Weights, shape: shapes.Shape, dtype: torch.dtype, gather: torch.Tensor | None = None) -> "Launch":
        """The decoding or batch kernel, as `shape` says."""
        lib = library(form, dtype)
        function = lib.rosaq_decode if isinstance(shape.sizes, shapes.DecodeShape) else lib.rosaq_batch
        return cls(lib, function, ctypes.byref(weights), shape, form.columns, gather)

    def __call__(self, x: torch.Tensor, y: torch.Tensor, overlap: bool = True) -> None:
        """Launch on the current stream of x's device; `overlap`: start fetching weights before the previous kernel has finished."""
        device = x.get_device()
        if device != torch.cuda.current_device():
            with torch.cuda.device(device):
                self(x, y, overlap)
            return
        shape, x_stride = self.shape, x.stride(0) if x.shape[0] > 1 else self.columns
        current = torch._C._cuda_getCurrentRawStream(device)  # what Triton's launches use; torch.cuda.current_stream makes an object
        code = self.function(self.weights, x.data_ptr(), x_stride, y.data_ptr(), y.stride(0), shape.sizes, shape.variant, overlap, current)
        if code:
            raise RuntimeError(f"CUDA kernel not launched: {self.library.rosaq_error(code).decode()} ({shape})")


def why_not(layout: LinearLayout, device: torch.device, dtype: torch.dtype) -> str | None:
    """None for float16 and bfloat16 activations on a Hopper GPU, where nvcc (or an earlier build) is at hand."""
    if device.type != "cuda":
        return f"the device is {device}, not a CUDA GPU"
    if dtype not in _TYPES:
        return f"activations are {dtype}; it takes float16 and bfloat16"
    capability = torch.cuda.get_device_capability(device)
    if capability != (9, 0):
        return f"it is built for compute capability 9.0 (Hopper); {device} has {capability[0]}.{capability[1]}"
    form, _, _ = stream.plan(_unordered(layout))
    if form.q_items + form.s_items < 2:
        return f"{layout.in_features} input channels are one item of its stream; the batch kernel takes two or more"
    return build.why_not(form.bits, form.group_runs, _TYPES[dtype])


def prepare(layout: LinearLayout, tensors: Mapping[str, torch.Tensor], dtype: torch.dtype) -> Prepared:
    """Repack on the device that the tensors are on, and build the library if need be."""
    device = tensors["qweight"].device
    form, gather, runs = stream.plan(_unordered(layout))
    if layout.ordered:  # column j of the stored weight meets input channel order[j]
        positions = torch.cat((tensors["order"].long().cpu(), torch.tensor([layout.in_features])))
        if gather is None:
            gather = torch.arange(layout.in_features)
        gather = positions[gather]
    salient_scales = None
    if layout.salient and layout.salient_bits == 8:
        salient_scales = torch.nn.functional.pad(tensors["salient_scales"], (0, form.tiles * stream.TILE - layout.out_features))
    bias = tensors.get("bias")
    prepared = Prepared(
        form=form,
        stream=stream.repack(layout, tensors, form, runs, dtype),
        salient_scales=salient_scales,
        bias=None if bias is None else bias.to(dtype),
        gather=None if gather is None else gather.to(device),
    )
    library(form, dtype)
    _ = prepared.weights, prepared.boxed  # made now rather than in a captured graph
    register()
    torch.cuda.current_stream(device).synchronize()  # kernels fetch weights before the kernels in front of them have finished
    return prepared


def run(x_MK: torch.Tensor, prepared: Prepared) -> torch.Tensor:
    """The product (M, N) in the type of x."""
    if torch.compiler.is_compiling():
        tensors = (prepared.stream, prepared.salient_scales, prepared.bias, prepared.gather)
        return torch.ops.rosaq.cuda_matmul(x_MK, *tensors, list(astuple(prepared.form)))
    return _matmul(x_MK, prepared)


@lru_cache(maxsize=1)
def register() -> torch.library.Library:
    """Make `torch.ops.rosaq.cuda_matmul`, which torch.compile sees as one node."""
    ops = torch.library.Library("rosaq", "FRAGMENT")
    ops.define("cuda_matmul(Tensor x, Tensor stream, Tensor? salient_scales, Tensor? bias, Tensor? gather, int[] form) -> Tensor")
    ops.impl("cuda_matmul", lambda x, s, ss, b, g, form: _matmul(x, Prepared(Form(*form), s, ss, b, g)), "CUDA")
    torch.library.register_fake("rosaq::cuda_matmul", lambda x, s, ss, b, g, form: x.new_empty(x.shape[0], Form(*form).out_features), lib=ops)
    return ops


def library(form: Form, dtype: torch.dtype) -> ctypes.CDLL:
    """The built library for this form and type."""
    loaded = build.load(form.bits, form.group_runs, _TYPES[dtype])
    pointer, length, number = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int32
    loaded.rosaq_error.restype = ctypes.c_char_p
    for function, sizes in ((loaded.rosaq_decode, shapes.DecodeShape), (loaded.rosaq_batch, shapes.BatchShape)):
        function.argtypes = [pointer, pointer, length, pointer, length, sizes, number, number, pointer]
    return loaded


def _unordered(layout: LinearLayout) -> LinearLayout:
    """The layout without its gather, which `prepare` composes with the kernel's own."""
    if not layout.ordered:
        return layout
    fields = {**layout.__dict__, "ordered": False}
    return LinearLayout(**fields)


def _matmul(x: torch.Tensor, prepared: Prepared) -> torch.Tensor:
    """Launch on the current stream of x's device."""
    tokens = x.shape[0]
    if prepared.gather is not None:
        x = torch.nn.functional.pad(x, (0, 1)).index_select(1, prepared.gather)
    if x.stride(1) != 1 or x.data_ptr() % 16 or (tokens > 1 and (x.stride(0) % 8 or x.stride(0) < x.shape[1])):
        x = x.clone(memory_format=torch.contiguous_format)
    if tokens > PREFILL_TOKENS:
        return _prefill(x, prepared.weights, prepared.bias, prepared.form)
    y = x.new_empty((tokens, prepared.form.out_features))
    if tokens:
        found = prepared.launches.get(tokens)
        if found is None:
            found = prepared.launches[tokens] = _planned(prepared, tokens, x)
        if found.gather is not None:
            x = torch.nn.functional.pad(x, (0, 1)).index_select(1, found.gather)
        found(x, y)
    return y


def _planned(prepared: Prepared, tokens: int, x: torch.Tensor) -> Launch:
    form, weights, gather = prepared.form, prepared.weights, None
    if tokens > shapes.DECODE_TOKENS and prepared.boxed is not None:
        form, gather, weights = prepared.boxed
    return Launch.of(form, weights, shapes.choose(form, tokens, _multiprocessors(x.device.index)), x.dtype, gather)


@lru_cache(maxsize=256)
def _boxed(form: Form, device: torch.device) -> tuple[Form, torch.Tensor]:
    """`stream.boxed` with the gather on a device."""
    plain, gather = stream.boxed(form)
    return plain, gather.to(device)


def _weights(prepared: Prepared, form: Form) -> _Weights:
    pointers = [None if t is None else t.data_ptr() for t in (prepared.stream, prepared.salient_scales, prepared.bias)]
    return _Weights(*pointers, form.scales_offset, form.salient_offset, *astuple(form)[2:])


def launch(x: torch.Tensor, y: torch.Tensor, weights: _Weights, form: Form, shape: shapes.Shape, overlap: bool = True) -> None:
    """One launch of the decoding or batch kernel, cut as `shape` says."""
    Launch.of(form, weights, shape, x.dtype)(x, y, overlap)


def _prefill(x: torch.Tensor, weights: _Weights, bias: torch.Tensor | None, form: Form) -> torch.Tensor:
    """Dequantize into scratch memory and multiply with cuBLAS."""
    padded = form.columns != form.q_valid * form.blocks + form.s_valid * form.blocks or form.q_runs_per_block * stream.RUN != form.q_valid
    make = torch.zeros if padded else torch.empty
    weight = make(form.out_features, form.columns, dtype=x.dtype, device=x.device)
    lib = library(form, x.dtype)
    with torch.cuda.device(x.device):
        code = lib.rosaq_dequantize(
            ctypes.byref(weights),
            ctypes.c_void_p(weight.data_ptr()),
            ctypes.c_int64(form.columns),
            ctypes.c_void_p(torch.cuda.current_stream(x.device).cuda_stream),
        )
    if code:
        raise RuntimeError(f"CUDA kernel not launched: {lib.rosaq_error(code).decode()}")
    return torch.nn.functional.linear(x, weight, bias)


@lru_cache(maxsize=16)
def _multiprocessors(device: int) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count
