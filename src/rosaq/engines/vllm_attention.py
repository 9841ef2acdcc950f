"""An attention backend for vLLM, `--attention-backend CUSTOM`: its Triton one, with a kernel of ours for decoding and FlashAttention 3 for prompts.

Sequences that have one token in a step go to `kernels/attention.py`, which reads an FP8 cache twice as fast as vLLM's kernels do. On Hopper the
step's other tokens go to the FlashAttention 3 that vLLM has, and would choose by itself; from an FP8 cache by way of 16-bit copies of the pages
they need, so that queries need not be rounded. What these do not compute (windows, soft caps, ALiBi, sinks, other types of cache) goes to vLLM's
Triton kernels, and so do prompts on other GPUs. Any model can be served with it. Written for vLLM 0.24; the layout of 0.32's cache is known, too.
"""

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from vllm.platforms import current_platform
from vllm.triton_utils import HAS_TRITON
from vllm.v1.attention.backend import AttentionCGSupport, AttentionType
from vllm.v1.attention.backends.registry import AttentionBackendEnum
from vllm.v1.attention.backends.triton_attn import (
    TritonAttentionBackend,
    TritonAttentionImpl,
    TritonAttentionMetadata,
    TritonAttentionMetadataBuilder,
)
from vllm.v1.attention.backends.utils import split_decodes_and_prefills

from rosaq.engines.serving import CACHES, HEAD_SIZES

COPIES = 1 << 30  # bytes that keys and values of one step's prompts may take for a while, as FP8 and as 16 bits


def flash_attention() -> Any:
    """The function of vLLM's FlashAttention where version 3 is its choice, as on Hopper, else None."""
    if not current_platform.is_cuda():
        return None
    from vllm.v1.attention.backends.fa_utils import flash_attn_varlen_func, get_flash_attn_version  # noqa: PLC0415  (not in the CPU build)

    return flash_attn_varlen_func if get_flash_attn_version() == 3 else None


@dataclass
class Prompts:
    """The sequences of a step that have several tokens, or may have: they come behind those that decode.

    Attributes:
        first: how many sequences, and tokens, come before them.
        starts: (sequences + 1) int32: where each one's new tokens begin, counted from the first of all.
        lengths: (sequences,) of each with what is in the cache, on the host.
        tokens: their sum.
        places: see `cached_places`; None until the first layer asks.
    """

    first: int
    starts: torch.Tensor
    lengths: torch.Tensor
    tokens: int
    places: tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None = None

    def cached_places(self, table: torch.Tensor, page: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Page and place in it of each token in the cache, sequence after sequence, and where each sequence begins (int32).

        Args:
            table: (sequences, pages) which pages hold a sequence, of these sequences only.
            page: tokens of a page.
        """
        if self.places is None:
            lengths = self.lengths.to(table.device, non_blocking=True)
            starts = torch.zeros(len(lengths) + 1, dtype=torch.int32, device=table.device)
            starts[1:] = lengths.cumsum(0)
            sequence = torch.arange(len(lengths), device=table.device).repeat_interleave(lengths, output_size=self.tokens)
            token = torch.arange(self.tokens, device=table.device) - starts[sequence]
            self.places = table[sequence, token // page].long(), token % page, starts
        return self.places


class RosaqAttentionImpl(TritonAttentionImpl):
    """The attention of one layer."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        """As vLLM's, but queries stay in the model's type: ours reads an FP8 cache with them as fast, and FP8 queries are less accurate."""
        super().__init__(*args, **kwargs)
        self.supports_quant_query_input = False
        self.fp8 = self.kv_cache_dtype in ("fp8", "fp8_e4m3")
        self.ours = (
            self.kv_cache_dtype in CACHES
            and self.attn_type == AttentionType.DECODER
            and self.head_size in HEAD_SIZES
            and self.sliding_window == (-1, -1)
            and not self.logits_soft_cap
            and self.alibi_slopes is None
            and self.sinks is None
            and self.chunk_lookback < 0
        )
        self.flash: Any = flash_attention() if self.ours else None
        if self.ours and current_platform.is_cuda() and HAS_TRITON:
            from rosaq.kernels.attention import workspace  # noqa: PLC0415  (Triton's)

            workspace(torch.device("cuda", torch.cuda.current_device()))  # before a graph is captured

    def decodes(self, step: TritonAttentionMetadata) -> bool:
        """Whether each sequence has one token."""
        return step.max_query_len == 1 and step.num_actual_tokens == step.seq_lens.shape[0]

    def flashes(self, step: TritonAttentionMetadata) -> bool:
        """Whether FlashAttention 3 computes the step's prompts: it is there, and copies of what they need of an FP8 cache are not too large."""
        if self.flash is None or step.prompts is None or step.causal is not True:
            return False
        return not self.fp8 or step.prompts.tokens * self.num_kv_heads * self.head_size * 6 <= COPIES

    def cache(self, kv_cache: torch.Tensor) -> torch.Tensor:
        """The cache as (pages, 2, tokens of a page, key-value heads, head size): as vLLM 0.24 has it, or heads first and values beside keys.

        Raises:
            ValueError: it has another form, which a later vLLM may give it.
        """
        size = self.head_size
        paged = kv_cache.view(torch.float8_e4m3fn) if self.fp8 else kv_cache
        if paged.dim() == 4 and paged.shape[3] == 2 * size:
            paged = paged.unflatten(3, (2, size)).permute(0, 3, 2, 1, 4)
        if paged.dim() != 5 or paged.shape[1] != 2 or paged.shape[3:] != (self.num_kv_heads, size):
            raise ValueError(
                f"a KV cache of shape {tuple(kv_cache.shape)}, which rosaq's attention (--attention-backend CUSTOM) does not know; name another"
            )
        return paged

    def forward(  # noqa: PLR0913  (vLLM's arguments)
        self,
        layer: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: torch.Tensor,
        attn_metadata: TritonAttentionMetadata,
        output: torch.Tensor,
        output_scale: torch.Tensor | None = None,
        output_block_scale: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Write the attention of one step to `output`, and return it. Shapes as in vLLM's class."""
        step, tokens = attn_metadata, 0
        quantized = output_scale is not None or output_block_scale is not None
        if self.ours and step is not None and not quantized and step.mm_prefix_range_tensor is None and getattr(step, "rswa_window", None) is None:
            if self.decodes(step):
                tokens = step.num_actual_tokens
            elif self.flashes(step):
                tokens = step.prompts.first
                self.prompts(layer, query, self.cache(kv_cache), step, output)
                if not tokens:
                    return output
        if not tokens:
            return super().forward(layer, query, key, value, kv_cache, step, output, output_scale, output_block_scale)
        from rosaq.kernels.attention import attend  # noqa: PLC0415  (Triton's)

        table, lengths = step.block_table[:tokens], step.seq_lens[:tokens]
        attend(query[:tokens], output[:tokens], self.cache(kv_cache), table, lengths, self.scale, layer._k_scale, layer._v_scale)
        return output

    def prompts(self, layer: Any, query: torch.Tensor, cache: torch.Tensor, step: TritonAttentionMetadata, output: torch.Tensor) -> None:
        """Write the attention of a step's prompts to their part of `output`, by FlashAttention 3 in 16 bits."""
        prompts, end = step.prompts, step.num_actual_tokens
        first, table = prompts.first, step.block_table[prompts.first :]
        how = dict(max_seqlen_q=step.max_query_len, cu_seqlens_q=prompts.starts, max_seqlen_k=step.max_seq_len, causal=True, fa_version=3)
        q, out, scale = query[first:end], output[first:end], self.scale
        if not self.fp8:
            keys, values = cache.unbind(1)
            self.flash(q, keys, values, out=out, softmax_scale=scale, seqused_k=step.seq_lens[first:], block_table=table, **how)
            return
        page, place, starts = prompts.cached_places(table, cache.shape[2])
        copies = cache.view(torch.uint8)[page, :, place].view(cache.dtype).to(query.dtype)  # (tokens, 2, key-value heads, head size)
        self.flash(q, copies[:, 0], copies[:, 1], out=out, softmax_scale=scale * layer._k_scale_float, cu_seqlens_k=starts, **how)
        if layer._v_scale_float != 1:
            out.mul_(layer._v_scale_float)


class RosaqAttentionMetadataBuilder(TritonAttentionMetadataBuilder):
    """A graph is captured with one token a sequence, so it serves only steps that have just that: mixed steps get no graph of their attention."""

    _cudagraph_support: ClassVar[AttentionCGSupport] = AttentionCGSupport.UNIFORM_BATCH

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        """As vLLM's, but a step's sequences come with those of one token first."""
        super().__init__(*args, **kwargs)
        self._init_reorder_batch_threshold(1)

    def build(self, common_prefix_len: int, common_attn_metadata: Any, fast_build: bool = False) -> TritonAttentionMetadata:
        """A step as vLLM describes it, and its prompts, None where it has none or their lengths are not known on the host."""
        step, common = super().build(common_prefix_len, common_attn_metadata, fast_build), common_attn_metadata
        step.prompts = None
        if common.max_query_len > 1 and common.seq_lens_cpu_upper_bound is not None:
            first = split_decodes_and_prefills(common)[0]
            lengths = common.seq_lens_cpu_upper_bound[first : common.num_reqs]  # exact for prompts
            step.prompts = Prompts(first, common.query_start_loc[first:] - first, lengths, int(lengths.sum()))
        return step


class RosaqAttentionBackend(TritonAttentionBackend):
    """What vLLM asks a backend; layout and types of the caches are its Triton backend's."""

    supported_dtypes: ClassVar[list[torch.dtype]] = [torch.float16, torch.bfloat16]

    @staticmethod
    def get_name() -> str:
        """The name of vLLM's place for backends of others."""
        return AttentionBackendEnum.CUSTOM.name

    @staticmethod
    def get_impl_cls() -> type[RosaqAttentionImpl]:
        """The class of a layer's attention."""
        return RosaqAttentionImpl

    @staticmethod
    def get_builder_cls() -> type[RosaqAttentionMetadataBuilder]:
        """The class that describes a step."""
        return RosaqAttentionMetadataBuilder
