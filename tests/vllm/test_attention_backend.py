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
    """Who computed a step of one token a sequence: ours with what it was given, or "vLLM's"."""
    (call,) = calls_of(monkeypatch, attention, cache, sequences, **changes)
    return call


def calls_of(monkeypatch, attention, cache=None, sequences=40, **changes):
    """All who computed a part of a step: FlashAttention by the dictionary of what it was given."""
    from vllm.v1.attention.backends.triton_attn import TritonAttentionImpl

    calls = []
    monkeypatch.setattr(TritonAttentionImpl, "forward", lambda *_: calls.append("vLLM's"))
    monkeypatch.setitem(sys.modules, "rosaq.kernels.attention", SimpleNamespace(attend=lambda *given: calls.append(given)))
    step = dict(
        num_actual_tokens=sequences,
        max_query_len=1,
        seq_lens=torch.ones(sequences),
        block_table=torch.arange(sequences)[:, None].int(),
        max_seq_len=9,
        causal=True,
        prompts=None,
    )
    layer = SimpleNamespace(_k_scale="k", _v_scale="v", _k_scale_float=2.0, _v_scale_float=1)
    if attention.flash:
        attention.flash = lambda *given, **named: calls.append(dict(zip("qkv", given, strict=True)) | named)
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
    return calls


def test_decoding_sequences_are_ours(monkeypatch):
    q, out, cache, table, lengths, scale, *scales = attended(monkeypatch, layer_attention())
    assert len(q) == len(out) == len(lengths) == len(table) == 40 and (scale, scales) == (0.125, ["k", "v"]) and cache.dtype == torch.float16
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
        dict(kv_cache_dtype="fp8_e5m2"),
    ],
    ids=str,
)  # fmt: skip
def test_other_layers_are_vllms(monkeypatch, changes):
    assert attended(monkeypatch, layer_attention(**changes)) == "vLLM's"


@pytest.mark.parametrize("changes", [dict(max_query_len=2), dict(num_actual_tokens=41), dict(mm_prefix_range_tensor=torch.zeros(1))], ids=str)
def test_other_steps_are_vllms(monkeypatch, changes):
    assert attended(monkeypatch, layer_attention(), **changes) == "vLLM's"


def mixed(first):
    """A step of `first` sequences that decode, of 5 tokens each, and one whose 4 new tokens follow 5 in the cache."""
    from rosaq.engines.vllm_attention import Prompts

    prompts = Prompts(first, torch.tensor([0, 4], dtype=torch.int32), torch.tensor([9]), 9)
    lengths = torch.tensor([5] * first + [9], dtype=torch.int32)
    return dict(sequences=first + 1, num_actual_tokens=first + 4, max_query_len=4, seq_lens=lengths, prompts=prompts)


def test_prompts_are_flash_attentions_where_it_is(monkeypatch):
    assert attended(monkeypatch, layer_attention(), **mixed(3)) == "vLLM's"  # none on a CPU
    attention = layer_attention()
    attention.flash = True
    flash, ours = calls_of(monkeypatch, attention, **mixed(3))
    assert len(ours[0]) == len(ours[3]) == len(ours[4]) == 3
    assert len(flash["q"]) == len(flash["out"]) == 4 and flash["k"].shape == (2, 16, 8, 64) and flash["softmax_scale"] == 0.125
    assert flash["seqused_k"].tolist() == [9] and flash["block_table"].tolist() == [[3]] and flash["causal"] is True
    (flash,) = calls_of(monkeypatch, attention, **mixed(0))
    assert flash["cu_seqlens_q"].tolist() == [0, 4]
    assert attended(monkeypatch, attention, **mixed(3) | dict(causal=False)) == "vLLM's"


def test_prompts_read_copies_of_an_fp8_cache(monkeypatch):
    from rosaq.engines import vllm_attention

    attention = layer_attention(kv_cache_dtype="fp8", num_kv_heads=2)
    attention.flash = True
    cache = torch.randn(4, 2, 8, 2, 64).to(torch.float8_e4m3fn)
    step = mixed(1) | dict(block_table=torch.tensor([[0, 0], [3, 1]], dtype=torch.int32))
    flash, ours = calls_of(monkeypatch, attention, cache.view(torch.uint8), **step)
    assert len(ours[0]) == 1 and ours[2].dtype == torch.float8_e4m3fn
    assert flash["cu_seqlens_k"].tolist() == [0, 9] and flash["softmax_scale"] == 0.25 and "block_table" not in flash
    for name, part in (("k", 0), ("v", 1)):  # 8 tokens of page 3, one of page 1
        assert flash[name].dtype == torch.float16 and torch.equal(flash[name], torch.cat([cache[3, part], cache[1, part, :1]]).half())
    monkeypatch.setattr(vllm_attention, "COPIES", 9 * 2 * 64 * 6 - 1)
    assert attended(monkeypatch, attention, cache.view(torch.uint8), **step) == "vLLM's"


def test_the_place_is_taken_on_cuda_only():
    from vllm.v1.attention.backends.registry import AttentionBackendEnum

    from rosaq.engines.vllm import register

    register()
    assert AttentionBackendEnum.CUSTOM.is_overridden() == torch.cuda.is_available()
