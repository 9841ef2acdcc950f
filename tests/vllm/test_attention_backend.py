"""Which steps the attention backend computes itself, and which it leaves to vLLM's; what it computes is tested where Triton is."""

import sys
from types import SimpleNamespace

import pytest
import torch

pytestmark = pytest.mark.vllm


def layer_attention(**changes):
    """An implementation of 8 query heads of 64, as vLLM makes it."""
    from rosaq.engines.vllm_attention import RosaqAttentionBackend

    arguments = dict(num_heads=8, head_size=64, scale=0.125, num_kv_heads=8, alibi_slopes=None, sliding_window=None, kv_cache_dtype="auto")
    return RosaqAttentionBackend.get_impl_cls()(**(arguments | changes))


def attended(monkeypatch, attention, cache=None, sequences=40, **changes):
    """Who computed a step of one token a sequence: "ours" with what it was given, or "vLLM's"."""
    from vllm.v1.attention.backends.triton_attn import TritonAttentionImpl

    calls = []
    monkeypatch.setattr(TritonAttentionImpl, "forward", lambda *_: calls.append("vLLM's"))
    monkeypatch.setitem(sys.modules, "rosaq.kernels.attention", SimpleNamespace(attend=lambda *given: calls.append(given)))
    step = dict(num_actual_tokens=sequences, max_query_len=1, seq_lens=torch.ones(sequences), block_table="table", seq_threshold_3D=16)
    layer = SimpleNamespace(_k_scale="k", _v_scale="v")
    q = torch.zeros(sequences + 3, 8, 64, dtype=torch.float16)
    attention.forward(
        layer,
        q,
        None,
        None,
        torch.zeros(2, 2, 16, 8, 64, dtype=torch.float16) if cache is None else cache,
        SimpleNamespace(**(step | dict(mm_prefix_range_tensor=None) | changes)),
        torch.empty_like(q),
    )
    (call,) = calls
    return call


def test_many_decoding_sequences_are_ours(monkeypatch):
    q, out, cache, table, lengths, scale, *scales = attended(monkeypatch, layer_attention())
    assert len(q) == len(out) == len(lengths) == 40 and (table, scale, scales) == ("table", 0.125, ["k", "v"]) and cache.dtype == torch.float16
    grouped = layer_attention(num_kv_heads=2, kv_cache_dtype="fp8")
    assert not grouped.supports_quant_query_input
    assert attended(monkeypatch, grouped, torch.zeros(2, 2, 16, 2, 64, dtype=torch.uint8))[2].dtype == torch.float8_e4m3fn


def test_the_cache_has_one_of_two_layouts(monkeypatch):
    """Since 0.24 a head's tokens come first, each token's value behind its key."""
    attention, later = layer_attention(), torch.randn(3, 8, 16, 128, dtype=torch.float16)
    _, _, cache, *_ = attended(monkeypatch, attention, later)
    assert cache.shape == (3, 2, 16, 8, 64) and cache.stride(4) == 1 and cache[2, 1, 5, 7, 3] == later[2, 7, 5, 64 + 3]
    with pytest.raises(ValueError, match=r"KV cache of shape \(2, 3, 16, 8, 64\)"):
        attended(monkeypatch, attention, torch.zeros(2, 3, 16, 8, 64, dtype=torch.float16))


@pytest.mark.parametrize(
    "changes",
    [
        dict(alibi_slopes=[1.0] * 8), dict(sliding_window=32), dict(logits_soft_cap=30.0), dict(sinks=torch.zeros(8)), dict(head_size=96),
        dict(kv_cache_dtype="fp8_e5m2"), dict(num_kv_heads=2),
    ],
    ids=str,
)  # fmt: skip
def test_other_layers_are_vllms(monkeypatch, changes):
    assert attended(monkeypatch, layer_attention(**changes)) == "vLLM's"


@pytest.mark.parametrize(
    "changes", [dict(max_query_len=2), dict(num_actual_tokens=41), dict(seq_threshold_3D=40), dict(mm_prefix_range_tensor=torch.zeros(1))], ids=str
)
def test_other_steps_are_vllms(monkeypatch, changes):
    assert attended(monkeypatch, layer_attention(), **changes) == "vLLM's"


def test_the_place_is_taken_on_cuda_only():
    from vllm.v1.attention.backends.registry import AttentionBackendEnum

    from rosaq.engines.vllm import register

    register()
    assert AttentionBackendEnum.CUSTOM.is_overridden() == torch.cuda.is_available()
