"""An attention backend for vLLM, `--attention-backend CUSTOM`: its Triton backend with a kernel of ours for decoding.

A step in which each of many sequences has one token goes to `kernels/attention.py`, which reads an FP8 cache twice as fast as vLLM's kernels do.
Prompts, mixed steps and what that kernel does not compute (windows, soft caps, ALiBi, sinks, other types of cache) go to vLLM's own, as do
few sequences, which vLLM splits over the GPU. Any model can be served with it. Written for vLLM 0.24; the layout of 0.32's cache is known, too.
"""

from typing import Any, ClassVar

import torch
from vllm.v1.attention.backend import AttentionCGSupport, AttentionType
from vllm.v1.attention.backends.registry import AttentionBackendEnum
from vllm.v1.attention.backends.triton_attn import (
    TritonAttentionBackend,
    TritonAttentionImpl,
    TritonAttentionMetadata,
    TritonAttentionMetadataBuilder,
)

HEAD_SIZES = (64, 128)
CACHES = {"auto": False, "float16": False, "bfloat16": False, "fp8": True, "fp8_e4m3": True}  # vLLM's names of what we read, and whether it is FP8


class RosaqAttentionImpl(TritonAttentionImpl):
    """The attention of one layer."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        """As vLLM's, but queries stay in the model's type: ours reads an FP8 cache with them as fast, and FP8 queries are less accurate."""
        super().__init__(*args, **kwargs)
        self.supports_quant_query_input = False
        self.fp8 = CACHES.get(self.kv_cache_dtype, False)
        self.ours = (
            self.kv_cache_dtype in CACHES
            and self.attn_type == AttentionType.DECODER
            and self.head_size in HEAD_SIZES
            and self.sliding_window == (-1, -1)
            and not self.logits_soft_cap
            and self.alibi_slopes is None
            and self.sinks is None
            and self.chunk_lookback < 0
            and (self.fp8 or self.num_queries_per_kv == 1)  # 16 bits and grouped heads: vLLM's kernel is as fast
        )

    def decodes(self, step: TritonAttentionMetadata) -> bool:
        """Whether each sequence has one token, and there are more sequences than vLLM would split over the GPU."""
        return (
            step.max_query_len == 1
            and step.num_actual_tokens == step.seq_lens.shape[0]
            and step.num_actual_tokens > step.seq_threshold_3D
            and step.mm_prefix_range_tensor is None
            and getattr(step, "rswa_window", None) is None  # since 0.24
        )

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
        quantized = output_scale is not None or output_block_scale is not None
        if not self.ours or attn_metadata is None or quantized or not self.decodes(attn_metadata):
            return super().forward(layer, query, key, value, kv_cache, attn_metadata, output, output_scale, output_block_scale)
        from rosaq.kernels.attention import attend  # noqa: PLC0415  (Triton's)

        tokens, step = attn_metadata.num_actual_tokens, attn_metadata
        attend(query[:tokens], output[:tokens], self.cache(kv_cache), step.block_table, step.seq_lens, self.scale, layer._k_scale, layer._v_scale)
        return output


class RosaqAttentionMetadataBuilder(TritonAttentionMetadataBuilder):
    """A graph is captured with one token a sequence, so it serves only steps that have just that: mixed steps get no graph of their attention."""

    _cudagraph_support: ClassVar[AttentionCGSupport] = AttentionCGSupport.UNIFORM_BATCH


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
