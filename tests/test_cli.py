"""The command line: what goes wrong is said in one sentence that names the thing, and the exit code is not 0."""

import json
import os
import subprocess
import sys

import psutil
import pytest
import torch
from safetensors.torch import load, save_file

from conftest import random_model, tokenizer

SIZES = [
    "--samples",
    "2",
    "--seq-len",
    "32",
    "--salient",
    "16",
    "--salient-per-head",
    "4",
    "--salient-down",
    "16",
    "--group-size",
    "16",
    "--device",
    "cpu",
]


def rosaq(*arguments):
    return subprocess.run([sys.executable, "-m", "rosaq", *map(str, arguments)], capture_output=True, text=True, check=False)


def run(monkeypatch, capfd, *arguments):
    """The command line in this process, which has PyTorch loaded: (exit code, standard output, standard error)."""
    from rosaq_cli.app import main

    capfd.readouterr()  # what saving the model printed
    monkeypatch.setattr("signal.signal", lambda *_: None)
    monkeypatch.setattr(sys, "argv", ["rosaq", *map(str, arguments)])
    try:
        main()
        code = 0
    except SystemExit as stop:
        code = stop.code or 0
    return code, *capfd.readouterr()


@pytest.fixture
def cli(monkeypatch, capfd):
    return lambda *arguments: run(monkeypatch, capfd, *arguments)


def test_quantize_evaluate_generate_verify(saved, text_file, tmp_path):
    original, out = saved("llama"), tmp_path / "out"
    done = rosaq("quantize", original, "-o", out, "--calibration", text_file, *SIZES)
    assert done.returncode == 0, done.stderr
    for word in ("bits per weight", "times smaller than FP16", "activations", "peak host memory"):
        assert word in done.stdout
    done = rosaq("evaluate", out, "--text", text_file, "--window", 32, "--against", original, "--json")
    figures = json.loads(done.stdout)["texts"][str(text_file)]
    assert 0 < figures["kl_divergence"] < 0.5 and 0.5 < figures["top1_agreement"] <= 1
    assert figures["model"]["windows"] > 100 and figures["model"]["window_tokens"] == 32
    done = rosaq("generate", out, "hello", "--max-tokens", 5)
    assert done.returncode == 0 and done.stdout.startswith("hello") and "per second" in done.stderr
    assert "whole, format 1" in rosaq("verify", out).stdout
    config = json.loads((out / "config.json").read_text())
    config["quantization_config"]["recipe"]["bits"] = 7
    (out / "config.json").write_text(json.dumps(config))
    done = rosaq("evaluate", out, "--data", tmp_path / "nowhere")  # the text that is not there is not what is wrong first
    assert done.returncode == 1 and f"{out / 'config.json'}: quantization_config.recipe" in "".join(done.stderr.split("\n"))


def refused(result, *words):
    code, _, err = result
    assert code == 1, err
    assert err.count("\n") == 1 and err.startswith("rosaq: ") and "Traceback" not in err, err
    for word in words:
        assert str(word) in err, err


def test_distill(cli, saved, text_file, tmp_path):
    original, packed, out = saved("llama"), tmp_path / "packed", tmp_path / "out"
    assert cli("quantize", original, "-o", packed, "--calibration", text_file, *SIZES)[0] == 0

    def distill(*options):
        return cli("distill", packed, "--model", original, "-o", out, "--calibration", text_file, "--seq-len", 32, "--device", "cpu", *options)

    refused(distill("--samples", 4), "samples is 4; distillation takes 8 windows a step")
    refused(distill("--learning-rates", "1e-3"), "--learning-rates is '1e-3'; it takes four numbers")
    code, shown, error = distill("--samples", 16, "--epochs", 2)
    assert code == 0 and "KL divergence" in shown and "4 steps" in shown, error
    assert "whole, format 1" in cli("verify", out)[1]
    refused(distill("--samples", 16), out, "output folder is not empty")


def test_bad_models(cli, saved, text_file, tmp_path):
    def quantize(model):
        return cli("quantize", model, "-o", tmp_path / "out", "--calibration", text_file, *SIZES)

    refused(quantize(tmp_path / "nothing"), tmp_path / "nothing", "no such folder or file")
    refused(quantize(tmp_path / "nothing.gguf"), "nothing.gguf", "no such file")
    refused(quantize(text_file), text_file, "a model is a folder, a .gguf file or a hub id")
    (tmp_path / "empty").mkdir()
    refused(quantize(tmp_path / "empty"), "no config.json")
    broken = tmp_path / "broken.gguf"
    broken.write_bytes(b"GGUF but not really")
    refused(quantize(broken), broken, "GGUF")
    refused(quantize("x" * 300), "File name too long")
    original = saved("llama")
    config = json.loads((original / "config.json").read_text())
    for change, words in (
        (dict(model_type="bert", architectures=["BertModel"]), ["'bert' is not supported", "llama (LlamaForCausalLM)", "qwen3"]),
        (dict(architectures=["LlamaForSequenceClassification"]), ["'LlamaForSequenceClassification' is not a causal language model"]),
        (dict(quantization_config={"quant_method": "gptq"}), ["already quantized (gptq)"]),
        (dict(rope_parameters={"rope_type": "spiral"}), ["cannot make a model of this config.json", "spiral"]),
    ):
        (original / "config.json").write_text(json.dumps({**config, **change}))
        refused(quantize(original), *words)
    (original / "config.json").write_text("{")
    refused(quantize(original), original / "config.json", "not valid JSON")
    assert not (tmp_path / "out").exists()


def test_a_hub_that_does_not_answer(tmp_path):
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "cache")}
    for arguments in (["quantize", "owner/model", "-o", tmp_path / "out"], ["evaluate", "owner/model", "--text", __file__]):
        command = [sys.executable, "-m", "rosaq", *map(str, arguments)]
        done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
        assert done.returncode == 1 and "owner/model: not a local path, and the hub did not give it" in done.stderr, done.stderr
        assert "Traceback" not in done.stderr and not (tmp_path / "out").exists()


def test_bad_weights(cli, saved, text_file, tmp_path):
    original = saved("llama")
    file = original / "model.safetensors"
    data = file.read_bytes()
    tensors = load(data)  # not memory-mapped: the file is about to change

    def quantize():
        return cli("quantize", original, "-o", tmp_path / "out", "--calibration", text_file, "--force", *SIZES)

    file.write_bytes(data[: len(data) // 2])
    refused(quantize(), file, "truncated or corrupt")
    file.write_bytes(b"\0" * 100)
    refused(quantize(), file, "truncated or corrupt")
    file.unlink()
    refused(quantize(), original, "no .safetensors file")
    name = "model.layers.1.mlp.gate_proj.weight"
    for value, words in ((float("nan"), "holds NaN or Inf"), (float("inf"), "holds NaN or Inf")):
        bad = {**tensors, name: tensors[name].clone()}
        bad[name][3, 3] = value
        save_file(bad, file, metadata={"format": "pt"})
        refused(quantize(), name, words)
    save_file({key: tensor for key, tensor in tensors.items() if key != name}, file, metadata={"format": "pt"})
    refused(quantize(), name, "is missing")
    save_file({**tensors, "model.layers.0.mlp.extra.weight": torch.ones(2)}, file, metadata={"format": "pt"})
    refused(quantize(), "model.layers.0.mlp.extra.weight", "is unknown")
    save_file({**tensors, name: tensors[name].to(torch.int32)}, file, metadata={"format": "pt"})
    refused(quantize(), name, "only float16, bfloat16 and float32")
    assert sorted(path.name for path in tmp_path.iterdir()) in (["llama-original", "text.jsonl"], [".out.partial", "llama-original", "text.jsonl"])


def test_activations_that_overflow_name_the_block(cli, text_file, tmp_path):
    model = random_model("llama")
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight.mul_(1e38)
        model.model.layers[1].mlp.gate_proj.weight.mul_(1e38)
    model.save_pretrained(tmp_path / "model")
    tokenizer().save_pretrained(tmp_path / "model")
    result = cli("quantize", tmp_path / "model", "-o", tmp_path / "out", "--calibration", text_file, *SIZES)
    refused(result, "decoder block 1, inputs of mlp.down_proj", "NaN or Inf")


def test_weights_that_no_scale_spans_name_the_block(cli, text_file, tmp_path):
    model = random_model("llama")
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight.mul_(1e9)
    model.save_pretrained(tmp_path / "model")
    tokenizer().save_pretrained(tmp_path / "model")
    for recipe, where in (("awq", "decoder block 1: "), ("rtn", "model.layers.1.mlp.down_proj: ")):
        result = cli("quantize", tmp_path / "model", "-o", tmp_path / recipe, "--calibration", text_file, *SIZES, "--recipe", recipe)
        refused(result, f"{where}a group of weights spans", "more than an FP16 scale of a 4-bit grid can hold")


def test_bad_calibration(cli, saved, tmp_path):
    original = saved("llama")

    def quantize(text, *more):
        return cli("quantize", original, "-o", tmp_path / "out", "--calibration", text, *SIZES, *more)

    refused(quantize(tmp_path / "none.txt"), "none.txt", "no such file", "pile, c4, wikitext2, self")
    (tmp_path / "blank.txt").write_text(" \n ")
    refused(quantize(tmp_path / "blank.txt"), "blank.txt", "holds no text")
    (tmp_path / "short.txt").write_text("abc")
    refused(quantize(tmp_path / "short.txt"), "3 tokens of text, but 2 windows of 32 need 64")
    (tmp_path / "odd.jsonl").write_text('{"text": "abc"}\n{"body": 3}\n')
    refused(quantize(tmp_path / "odd.jsonl"), "odd.jsonl, line 2", "no field 'text'")
    (tmp_path / "odd.jsonl").write_text("not json\n")
    refused(quantize(tmp_path / "odd.jsonl"), "odd.jsonl, line 1", "not valid JSON")
    refused(quantize("self", "--seq-len", 129), "seq-len is 129 tokens", "context of 128")
    refused(quantize("self", "--samples", 0), "samples is 0")


def test_bad_options(cli, saved, text_file, tmp_path):
    original = saved("llama")

    def quantize(*more):
        return cli("quantize", original, "-o", tmp_path / "out", "--calibration", text_file, *SIZES, *more)

    refused(quantize("--recipe", "magic"), "unknown recipe 'magic'", "rosaq-paper")
    (tmp_path / "r.toml").write_text('name = "x"\ncolour = "red"\n')
    refused(quantize("--recipe", tmp_path / "r.toml"), "r.toml", "unknown key 'colour'", "group_size")
    (tmp_path / "r.toml").write_text("name = \n")
    refused(quantize("--recipe", tmp_path / "r.toml"), "r.toml", "not a TOML file")
    refused(quantize("--bits", 5), "bits is 5; allowed are (2, 3, 4)")
    for target in ("1", "17", "nan"):
        refused(quantize("--target-bits", target), f"target_bits is {target}", "this model can have 2.")
    refused(quantize("--salient", 48), "salient is 48", "allowed are 0 to 47")
    refused(quantize("--salient-per-head", 16), "salient_per_head is 16", "allowed are 0 to 15")
    refused(quantize("--group-size", 20), "group_size is 20", "multiple of 16")
    refused(quantize("--device", "cuda:77"), "device 'cuda:77'")
    refused(quantize("--device", "tpu"), "device 'tpu'; allowed are auto, cpu, cuda")
    refused(quantize("-o", tmp_path / ("x" * 300)), "File name too long")
    refused(quantize("-o", "/proc/x"), "/proc/.x.partial: cannot be written: No such file or directory\n")
    refused(cli("compare", original, "-o", tmp_path / "out", "--recipes", "rtn@x"), "--recipes 'rtn@x': the target behind @ is 'x'; it must be")
    assert not list(tmp_path.glob("*xx*"))
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "file").write_text("")
    refused(quantize(), tmp_path / "out", "output folder is not empty")
    assert rosaq("quantize").returncode == 2


def test_bad_evaluation(cli, saved, tmp_path):
    original = saved("llama")
    (tmp_path / "short.txt").write_text("abc")
    refused(cli("evaluate", original, "--text", tmp_path / "none.txt"), "none.txt", "cannot be read")
    refused(cli("evaluate", original, "--text", tmp_path / "short.txt"), "3 tokens, less than one window of 2048")
    refused(cli("evaluate", original, "--tasks", "ptb"), "task 'ptb': no text file, and not one of wikitext2, csr, piqa", "mmlu")
    refused(cli("evaluate", original, "--text", tmp_path / "short.txt", "--every", 0), "--every is 0; it must be at least 1")
    refused(cli("evaluate", original, "--tasks", "csr,mmlu", "--data", tmp_path), "piqa_validation.jsonl: no such file", "--data")
    refused(cli("evaluate", original, "--tasks", "piqa", "--data", tmp_path, "--against", original), "--against", "add wikitext2 or a text file")
    refused(cli("evaluate", original, "--data", tmp_path), "wiki.test.raw: no such file")
    refused(cli("evaluate", original, "--text", tmp_path / "short.txt", "--window", 2, "--dtype", "int8"), "dtype 'int8'; allowed are auto")
    (tmp_path / "long.txt").write_text("abc " * 200)
    refused(cli("evaluate", original, "--text", tmp_path / "long.txt", "--window", 129), "a window has 129 tokens", "context of 128")
    random_model("llama", vocab_size=64).save_pretrained(tmp_path / "smaller")
    tokenizer(64).save_pretrained(tmp_path / "smaller")
    against = ("--against", tmp_path / "smaller", "--text", tmp_path / "long.txt", "--window", 32)
    refused(cli("evaluate", original, *against), "the model has 97 tokens and the one that it is compared with 64")
    (tmp_path / "smaller" / "tokenizer.json").unlink()
    refused(cli("evaluate", tmp_path / "smaller", *against[2:]), "smaller: the tokenizer cannot be read")
    refused(cli("generate", original, "abc", "--max-tokens", 1000), "--max-tokens is at most 125")
    refused(cli("generate", original, "abc", "--max-tokens", 0), "--max-tokens is 0; it must be at least 1")
    refused(cli("generate", original, "abc", "--temperature", "nan"), "temperature is nan; it must be 0 or more, and finite")
    refused(cli("generate", original, "abc", "--seed", -1), "seed is -1; allowed are 0 to 2^64 - 1")
    refused(cli("generate", original, "abc", "--chat"), "no chat template")
    refused(cli("verify", original), "not the folder of a rosaq checkpoint")
    if not torch.cuda.is_available():
        refused(cli("benchmark", "kernels"), "sees no CUDA GPU")
    refused(cli("benchmark", "kernels", "--bits", 5), "bits 5; allowed are 2, 3, 4")


def test_bad_comparisons_leave_nothing(cli, saved, tmp_path):
    original, out = saved("llama"), tmp_path / "out"
    for option in ("--window", "--windows", "--limit"):
        refused(cli("compare", original, "-o", out, "--recipes", "rtn", option, 0), f"{option} is 0; it must be at least 1")
    refused(cli("compare", original, "-o", out, "--recipes", "rtn", "--dtype", "int8"), "dtype 'int8'; allowed are auto")
    assert not out.exists()


def test_where_results_go_is_looked_at_before_the_work(cli, saved, text_file, tmp_path, monkeypatch):
    def work(*_, **__):
        raise AssertionError("this comes after the check")

    for name in ("rosaq.inspection.report.inspect", "rosaq.benchmark.quantizing.benchmark_quantize", "rosaq.benchmark.decoding.benchmark_decoding"):
        monkeypatch.setattr(name, work)
    original, below = saved("llama"), text_file / "folder"
    refused(cli("inspect", original, "-o", below, "--device", "cpu"), below, f"cannot be written: {text_file} is not a folder")
    benchmark = ("benchmark", "quantize", "tiny", "--folder", tmp_path, "--recipe", "rtn", "-o", below / "x.json")
    refused(cli(*benchmark), "cannot be written", text_file)
    refused(cli("benchmark", "decode", "smollm2-135m", "--engine", "transformers", "-o", below / "x.json"), "cannot be written", text_file)


def test_a_gguf_file_that_is_cut_short(cli, smollm2, text_file, tmp_path):
    """Anywhere: in its header, among the tokenizer's words, among the weights."""
    short = tmp_path / "short.gguf"
    with smollm2.open("rb") as file:
        head = file.read(3 << 20)
    for size in (2000, 100_000, 1 << 20, 3 << 20):
        short.write_bytes(head[:size])
        refused(cli("quantize", short, "-o", tmp_path / "out", "--calibration", text_file, *SIZES), short, "truncated or corrupt")
    short.write_bytes(head[:16] + b"\xff" + head[17:])
    refused(cli("quantize", short, "-o", tmp_path / "out", "--calibration", text_file, *SIZES), short, "truncated or corrupt")
    assert not (tmp_path / "out").exists()


def test_recipes_state_their_bits(cli):
    code, out, _ = cli("recipes", "--json")
    table = json.loads(out)
    rows = {row["name"]: row for row in table["recipes"]}
    assert code == 0 and table["model"] == "Llama-2-7B"
    assert [rows["rtn"][key] for key in ("bits per weight, INT4", "INT3", "INT2")] == ["4.16", "3.16", "2.16"]
    assert [rows["rosaq-paper"][key] for key in ("bits per weight, INT4", "INT3")] == ["4.66", "3.70"]
    assert cli("recipes")[1].count("4.66") >= 5


def test_help_needs_no_pytorch():
    code = "import sys; sys.argv = ['rosaq', '--help']\nfrom rosaq_cli.app import main\n"
    code += "try: main()\nexcept SystemExit: pass\nassert 'torch' not in sys.modules"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, check=False).returncode == 0
    assert rosaq("--version").stdout.startswith("rosaq 0.")


def test_serve_says_what_is_missing(cli, saved, tmp_path):
    from rosaq import load_recipe
    from rosaq.benchmark.model_shapes import shape_config
    from rosaq.engines.dummy import dummy_config, write_dummy

    refused(cli("serve", saved("llama"), "--port", "1"), "not the folder of a rosaq checkpoint", "vllm serve")
    recipe = load_recipe("rosaq-int4").replace(group_size=16, salient=16, salient_per_head=4, salient_down=16)
    write_dummy(dummy_config(shape_config(str(tmp_path / "llama-original")), recipe, torch.float16), tmp_path / "out")
    refused(cli("serve", tmp_path / "out", "--port", "1"), "vLLM is not installed in this environment", "pip install")


def test_serve_fills_in_what_is_not_given(monkeypatch, saved, tmp_path):
    from rosaq import load_recipe
    from rosaq.benchmark.model_shapes import shape_config
    from rosaq.engines import serving
    from rosaq.engines.dummy import dummy_config, write_dummy

    monkeypatch.setattr(serving, "vllm_installed", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(serving, "available_bytes", lambda: psutil.virtual_memory().total // 2)
    monkeypatch.delenv("VLLM_CPU_KVCACHE_SPACE", raising=False)
    recipe = load_recipe("rosaq-int4").replace(group_size=16, salient=16, salient_per_head=4, salient_down=16)
    write_dummy(dummy_config(shape_config(str(saved("llama"))), recipe, torch.float16), tmp_path / "out")
    command = serving.serve_command(tmp_path / "out", ["--port", "1"])
    assert command[3:] == [
        "serve", str(tmp_path / "out"), "--dtype", "bfloat16", "--max-model-len", "128", "--served-model-name", "out",
        "--gpu-memory-utilization", "0.25", "--port", "1",
    ]  # fmt: skip
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "1")  # who sizes the cache is left alone
    given = serving.serve_command(tmp_path / "out", ["--max_model_len=64", "--dtype", "float32", "--served-model-name", "a", "b"])
    assert given[4:] == [str(tmp_path / "out"), "--max_model_len=64", "--dtype", "float32", "--served-model-name", "a", "b"]
    (tmp_path / "options.yaml").write_text("max_model_len: 32\nport: 1\n")
    filed = serving.serve_command(tmp_path / "out", ["--config", str(tmp_path / "options.yaml")])
    assert "--max-model-len" not in filed and "--dtype" in filed  # vLLM lets the command line win over the file
    (tmp_path / "options.yaml").write_text("- port\n")
    with pytest.raises(ValueError, match="not YAML of names and values"):
        serving.serve_command(tmp_path / "out", [f"--config={tmp_path / 'options.yaml'}"])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    heads = load_recipe("rosaq-int4").replace(group_size=16, salient=16, salient_per_head=16, salient_down=16)
    write_dummy(dummy_config(shape_config(str(saved("llama", head_dim=64))), heads, torch.float16), tmp_path / "heads")
    for capability, name, options, overlap, attention in (
        ((9, 0), "heads", [], True, True),
        ((9, 0), "out", [], True, False),  # its heads have another size
        ((9, 0), "heads", ["--attention_backend=FLASH_ATTN"], True, False),
        ((9, 0), "heads", ["--kv-cache-dtype", "fp8"], True, True),
        ((9, 0), "heads", ["--kv-cache-dtype", "fp8_e5m2"], True, False),
        ((9, 0), "heads", ["--dtype", "float32"], True, False),
        ((8, 0), "heads", [], False, False),
        ((9, 0), "heads", ["-cc.mode=3"], False, True),
        ((9, 0), "heads", ["--compilation-config", "{}"], False, True),
    ):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda capability=capability: capability)
        command = serving.serve_command(tmp_path / name, options)
        assert (serving.OVERLAP in command) == overlap and json.loads(serving.OVERLAP) and ("--dtype" in options or command[6] == "float16")
        assert ("CUSTOM" in command) == attention, options
