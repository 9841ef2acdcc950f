"""A loaded checkpoint on GPUs: compiled with CUDA graphs, trained on with an adapter, spread over two devices."""

import pytest
import torch
from transformers import AutoModelForCausalLM

from rosaq import Calibration, load_recipe, quantize

pytestmark = pytest.mark.gpu
IDS = torch.arange(3, 43).view(2, 20)


@pytest.fixture
def checkpoint(saved, text_file, tmp_path):
    recipe = load_recipe("rosaq-int4").replace(group_size=16, salient=16, salient_per_head=4, salient_down=16, embedding_bits="8")
    quantize(str(saved("llama-biased")), tmp_path / "out", recipe, Calibration(str(text_file), 2, 32), "cuda")
    return tmp_path / "out"


def test_a_compiled_model_with_a_static_cache_generates_the_same(checkpoint):
    """As `generate` compiles it by itself: Inductor, and CUDA graphs in which the kernels are launched."""
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float16, device_map="cuda").eval()
    ask = dict(max_new_tokens=24, do_sample=False, eos_token_id=None, output_logits=True, return_dict_in_generate=True)
    plain = model.generate(IDS.cuda(), **ask)
    for _ in range(3):  # compiled, captured, replayed
        compiled = model.generate(IDS.cuda(), cache_implementation="static", **ask)
    first = zip(plain.logits[:2], compiled.logits[:2], strict=True)  # of the prompt, and of one token from the cache
    assert all(float((a - b).norm() / a.norm()) < 0.02 for a, b in first)
    same = (plain.sequences == compiled.sequences)[:, IDS.shape[1] :].float().mean()
    assert same > 0.5  # a tie decided otherwise changes what follows


def test_a_lora_adapter_learns_on_top(checkpoint):
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.bfloat16, device_map="cuda")
    model = get_peft_model(base, LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(5):
        loss = model(input_ids=IDS.cuda(), labels=IDS.cuda()).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0] - 0.3


def test_a_model_spread_over_two_gpus_computes_the_same(checkpoint):
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    devices = {"model.embed_tokens": 0, "model.rotary_emb": 0, "model.layers.0": 0, "model.layers.1": 1, "model.norm": 1, "lm_head": 1}
    one, two = (AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float16, device_map=place) for place in ("cuda:0", devices))
    assert {str(tensor.device) for tensor in two.state_dict().values()} == {"cuda:0", "cuda:1"}
    with torch.inference_mode():
        assert torch.equal(one(IDS.cuda()).logits, two(IDS.cuda()).logits.cuda(0))
