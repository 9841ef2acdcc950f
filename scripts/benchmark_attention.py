"""Times decoding attention over a paged cache: rosaq's kernel beside vLLM's FlashAttention 3 and Triton kernel, in one process.

Usage: python scripts/benchmark_attention.py [--heads 32/32 32/8 28/4] [--steps 1x192 16x192 ...]     (in an environment with vLLM 0.24, on Hopper)
A step is SEQUENCESxTOKENS. Each kernel runs in a CUDA graph over the caches of so many layers that they do not stay in the chip's cache; us a layer,
median of three, and how far rosaq's result is from FlashAttention's (Frobenius norm, relative). Random queries, keys, values and pages.
"""

import argparse
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from vllm.v1.attention.ops.triton_unified_attention import unified_attention
from vllm.vllm_flash_attn import flash_attn_varlen_func, get_scheduler_metadata

from rosaq.kernels.attention import attend, workspace

SIZE, PAGE = 128, 16  # of a head, and tokens of a page
ENOUGH = 200e6  # bytes that all layers' caches take together, four times the second-level cache
SPLITS = 32  # FlashAttention's, as vLLM asks for them in a CUDA graph
SEGMENTS = 16  # of the Triton kernel's pieces, as vLLM's backend has them


@dataclass
class Step:
    """Queries (sequences, heads, SIZE), their caches and pages by layer, and lengths."""

    heads: int
    key_heads: int
    sequences: int
    tokens: int
    eight: bool

    def __post_init__(self) -> None:
        """Draw them at random."""
        kind = torch.float8_e4m3fn if self.eight else torch.float16
        pages = -(-self.tokens // PAGE) * self.sequences
        layer = 2 * self.sequences * self.tokens * self.key_heads * SIZE * kind.itemsize
        layers = max(2, min(32, math.ceil(ENOUGH / layer)))
        self.bytes = layers * layer
        self.cache = torch.randn(layers * pages, 2, PAGE, self.key_heads, SIZE, device="cuda", dtype=torch.float16).to(kind)
        order = torch.randperm(layers * pages, device="cuda", dtype=torch.int32)
        self.tables = [part.view(self.sequences, -1).contiguous() for part in order.split(pages)]
        self.lengths = torch.full((self.sequences,), self.tokens, device="cuda", dtype=torch.int32)
        self.starts = torch.arange(self.sequences + 1, device="cuda", dtype=torch.int32)
        self.q = torch.randn(self.sequences, self.heads, SIZE, device="cuda", dtype=torch.float16)
        self.one = torch.ones((), device="cuda")

    def ours(self) -> tuple[Callable[[int], object], torch.Tensor]:
        """Rosaq's kernel for a layer, and where it writes."""
        out = torch.empty_like(self.q)
        return lambda layer: attend(self.q, out, self.cache, self.tables[layer], self.lengths, SIZE**-0.5, self.one, self.one), out

    def flash(self) -> tuple[Callable[[int], object], torch.Tensor]:
        """FlashAttention 3, as vLLM calls it: from an FP8 cache with queries in FP8 and results in bfloat16."""
        kind, scales = torch.float16, {}
        q, out = self.q, torch.empty_like(self.q)
        if self.eight:
            kind, scale = torch.float8_e4m3fn, self.one.expand(self.sequences, self.key_heads)
            q, out = q.to(kind), out.bfloat16()
            scales = dict(q_descale=scale, k_descale=scale, v_descale=scale)
        plan = get_scheduler_metadata(
            batch_size=self.sequences, max_seqlen_q=1, max_seqlen_k=self.tokens, num_heads_q=self.heads, num_heads_kv=self.key_heads,
            headdim=SIZE, cache_seqlens=self.lengths, qkv_dtype=kind, cu_seqlens_q=self.starts, page_size=PAGE, causal=True, window_size=(-1, -1),
            num_splits=SPLITS,
        )  # fmt: skip
        keys, values = self.cache.unbind(1)
        return lambda layer: flash_attn_varlen_func(
            q=q, k=keys, v=values, out=out, cu_seqlens_q=self.starts, max_seqlen_q=1, seqused_k=self.lengths, max_seqlen_k=self.tokens,
            softmax_scale=SIZE**-0.5, causal=True, window_size=[-1, -1], block_table=self.tables[layer], softcap=0.0, scheduler_metadata=plan,
            fa_version=3, num_splits=SPLITS, **scales,
        ), out  # fmt: skip

    def triton(self) -> tuple[Callable[[int], object], torch.Tensor]:
        """VLLM's Triton kernel, as its backend calls it."""
        most, out = max(1, SIZE // self.key_heads), torch.empty_like(self.q)
        parts = [torch.empty(most, self.heads, SEGMENTS, *rest, device="cuda") for rest in ((SIZE,), (), ())]
        scale = self.one.expand(self.sequences, self.key_heads)
        keys, values = self.cache.unbind(1)
        return lambda layer: unified_attention(
            q=self.q, k=keys, v=values, out=out, cu_seqlens_q=self.starts, max_seqlen_q=1, seqused_k=self.lengths, max_seqlen_k=self.tokens,
            softmax_scale=SIZE**-0.5, causal=True, window_size=(-1, -1), block_table=self.tables[layer], softcap=0, q_descale=None, k_descale=scale,
            v_descale=scale, seq_threshold_3D=128 // self.key_heads, num_par_softmax_segments=SEGMENTS, softmax_segm_output=parts[0],
            softmax_segm_max=parts[1], softmax_segm_expsum=parts[2],
        ), out  # fmt: skip

    def microseconds(self, run: Callable[[int], object]) -> float:
        """Of one layer."""
        run(0)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for layer in range(len(self.tables)):
                run(layer)
        graph.replay()
        rounds, found = max(3, min(20, int(4e-3 / (self.bytes / 3e12)))), []
        for _ in range(3):
            begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            begin.record()
            for _ in range(rounds):
                graph.replay()
            end.record()
            end.synchronize()
            found.append(begin.elapsed_time(end) * 1e3 / rounds / len(self.tables))
        return sorted(found)[1]


def main() -> None:
    """Print one line a step and type of cache."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--heads", nargs="+", default=["32/32", "32/8", "28/4"], help="query heads/key-value heads")
    parser.add_argument("--steps", nargs="+", default=["1x192", "16x192", "64x384", "128x192", "1x2048", "8x2048", "24x2048", "1x8000", "64x1500"])
    arguments = parser.parse_args()
    torch.manual_seed(0)
    workspace(torch.device("cuda", torch.cuda.current_device()))
    print(f"{torch.cuda.get_device_name()}, PyTorch {torch.__version__}; us a layer")
    print(f"{'heads':>6} {'step':>9} cache    flash   triton    rosaq  flash/rosaq  differs")
    for heads in arguments.heads:
        for sizes in arguments.steps:
            for eight in (False, True):
                (query_heads, key_heads), (sequences, tokens) = map(int, heads.split("/")), map(int, sizes.split("x"))
                step = Step(query_heads, key_heads, sequences, tokens, eight)
                calls = [step.flash(), step.triton(), step.ours()]
                flash, triton, ours = (step.microseconds(run) for run, _ in calls)
                for run, _ in calls:
                    run(0)
                wanted, found = calls[0][1].float(), calls[2][1].float()
                differs = float((found - wanted).norm() / wanted.norm())
                print(
                    f"{heads:>6} {sizes:>9} {'fp8' if eight else '16':>5} {flash:8.1f} {triton:8.1f} {ours:8.1f} {flash / ours:12.2f} {differs:8.4f}",
                    flush=True,
                )
                del step, calls
                torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
