"""The model to be quantized: config, tokenizer, and its tensors one at a time.

Tensors come from memory-mapped safetensors (a Hugging Face folder or hub id) or a memory-mapped GGUF file, one decoder
block at a time; no pickle is ever loaded.
"""

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError
from safetensors import SafetensorError, safe_open
from transformers import AutoConfig, AutoTokenizer, GenerationConfig

from rosaq.architecture import EMBEDDING, FINAL_NORM, HEAD, Architecture
from rosaq.gguf_file import GgufTensors

HUB_FILES = ["*.json", "*.safetensors", "tokenizer*", "*.model", "*.jinja", "LICENSE*"]


@dataclass(frozen=True)
class Source:
    """An unquantized causal language model.

    Attributes:
        name: what the user called it (hub id, folder or file).
        config: transformers config, without the loader's traces.
        architecture: its sizes.
        tensors: name -> tensor; reading is lazy for safetensors.
        dtype: type that unquantized tensors of the checkpoint are stored in.
    """

    name: str
    config: Any
    architecture: Architecture
    tensors: Mapping[str, torch.Tensor]
    dtype: torch.dtype
    tokenizer: Any = field(repr=False, default=None)
    generation_config: GenerationConfig | None = field(repr=False, default=None)

    def tensor(self, name: str) -> torch.Tensor:
        """One tensor, on the CPU, checked to be finite.

        Raises:
            ValueError: the tensor is missing, not of a floating type, or holds NaN or Inf; names it.
        """
        if name not in self.tensors:
            raise ValueError(f"{self.name}: tensor {name!r} is missing")
        tensor = self.tensors[name]
        if not tensor.is_floating_point() or tensor.itemsize < 2:
            raise ValueError(f"{self.name}: tensor {name!r} is of type {tensor.dtype}; only float16, bfloat16 and float32 weights can be quantized")
        if not torch.isfinite(tensor).all():
            raise ValueError(f"{self.name}: tensor {name!r} holds NaN or Inf")
        return tensor

    def block(self, index: int) -> dict[str, torch.Tensor]:
        """All tensors of decoder block `index`, by their name within the block."""
        prefix = self.architecture.block_prefix(index)
        names = [name for name in self.tensors if name.startswith(prefix)]
        for required in self.architecture.required():
            if prefix + required not in names:
                raise ValueError(f"{self.name}: tensor {prefix + required!r} is missing")
        known = {*self.architecture.required(), *self.architecture.family.optional}
        for name in names:
            if name.removeprefix(prefix) not in known and not name.endswith("rotary_emb.inv_freq"):
                raise ValueError(f"{self.name}: tensor {name!r} is unknown in a {self.architecture.family.model_type} block")
        return {name.removeprefix(prefix): self.tensor(name) for name in names if not name.endswith("rotary_emb.inv_freq")}

    def embedding(self) -> torch.Tensor:
        """Embedding table (vocabulary, hidden)."""
        return self.tensor(f"{EMBEDDING}.weight")

    def head(self) -> torch.Tensor:
        """Weight of lm_head (vocabulary, hidden); the embedding table itself in a tied model."""
        return self.embedding() if self.architecture.tied else self.tensor(f"{HEAD}.weight")

    def final_norm(self) -> torch.Tensor:
        """Weight of the norm before lm_head (hidden,)."""
        return self.tensor(f"{FINAL_NORM}.weight")

    def parameters(self) -> int:
        """Weights of the model, a tied table counted once."""
        a = self.architecture
        block = sum(torch.Size(a.shape(role)).numel() for role in ("q", "k", "v", "o", "gate", "up", "down")) + 2 * a.hidden
        return block * a.layers + a.vocabulary * a.hidden * (1 if a.tied else 2) + a.hidden


class SafetensorsFolder(Mapping[str, torch.Tensor]):
    """The tensors of a folder's safetensors files, read when asked for."""

    def __init__(self, folder: Path) -> None:
        """Open every file, memory-mapped, and index the names.

        Raises:
            ValueError: no safetensors file, a file that the index names is missing, or one is truncated or corrupt.
        """
        self._handles: dict[str, tuple[Path, Any]] = {}
        index = folder / "model.safetensors.index.json"
        if index.is_file():
            files = sorted({safe_member(folder, name) for name in read_json(index).get("weight_map", {}).values()})
        else:
            files = sorted(folder.glob("*.safetensors"))
        if not files:
            raise ValueError(f"{folder}: no .safetensors file; pickled weights (.bin, .pt) are not read")
        for file in files:
            for name in (handle := open_safetensors(file)).keys():  # noqa: SIM118  (not a mapping)
                self._handles[name] = (file, handle)

    def __getitem__(self, name: str) -> torch.Tensor:
        """Read one tensor."""
        file, handle = self._handles[name]
        try:
            return handle.get_tensor(name)
        except SafetensorError as error:
            raise ValueError(f"{file}: tensor {name!r} cannot be read: {error}") from error

    def __contains__(self, name: object) -> bool:
        """Whether there is such a tensor, without reading it."""
        return name in self._handles

    def __iter__(self) -> Iterator[str]:
        """Names of all tensors."""
        return iter(self._handles)

    def __len__(self) -> int:
        """Number of tensors."""
        return len(self._handles)


def safe_member(folder: Path, name: str) -> Path:
    """The path of a file that an index names, which must lie in the folder itself."""
    if Path(name).name != name:
        raise ValueError(f"{folder}: the index names {name!r}, which is not a plain file name")
    if not (folder / name).is_file():
        raise ValueError(f"{folder / name}: file is missing, though the index names it")
    return folder / name


def open_safetensors(file: Path) -> Any:
    """Open one safetensors file, memory-mapped.

    Raises:
        ValueError: the file is truncated or corrupt; names it.
    """
    try:
        return safe_open(file, framework="pt")
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{file}: not a readable safetensors file (truncated or corrupt): {error}") from error


def read_json(file: Path) -> dict[str, Any]:
    """A JSON object from a file.

    Raises:
        ValueError: missing, not JSON, or not an object; names the file.
    """
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"{file}: cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise ValueError(f"{file}: not valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise ValueError(f"{file}: holds a JSON {type(value).__name__}, not an object")
    return value


def open_source(model: str) -> Source:
    """Open a model by local folder, `.gguf` file, or hub id.

    Raises:
        ValueError: nothing is there, it is not a supported causal language model, or it is quantized already.
    """
    path = Path(model).expanduser()
    if path.suffix == ".gguf":
        if not path.is_file():
            raise ValueError(f"{path}: no such file")
        return _open_gguf(path)
    if path.is_dir():
        return _open_folder(path, model)
    if path.exists():
        raise ValueError(f"{path}: a model is a folder, a .gguf file or a hub id")
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", model):
        raise ValueError(f"{model}: no such folder or file, and not a hub id of the form owner/name")
    return _open_folder(_download(model), model)


def _download(repository: str) -> Path:
    try:
        return Path(snapshot_download(repository, allow_patterns=HUB_FILES))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise ValueError(f"{repository}: not a local path, and the hub did not give it: {str(error).splitlines()[0]}") from error


def _open_folder(folder: Path, name: str) -> Source:
    if not (folder / "config.json").is_file():
        raise ValueError(f"{folder}: no config.json, so this is not a model folder")
    raw = read_json(folder / "config.json")
    if raw.get("quantization_config"):
        raise ValueError(f"{name}: already quantized ({raw['quantization_config'].get('quant_method')}); give the original model")
    if "model_type" not in raw:
        raise ValueError(f"{folder / 'config.json'}: no model_type, so this is not a transformers model")
    try:
        config = AutoConfig.from_pretrained(folder, local_files_only=True)
    except (ValueError, KeyError) as error:
        raise ValueError(f"{folder / 'config.json'}: transformers cannot read it: {str(error).splitlines()[0]}") from error
    architecture = Architecture.of(config, name)
    tensors = SafetensorsFolder(folder)
    dtype = tensors[f"{EMBEDDING}.weight"].dtype if f"{EMBEDDING}.weight" in tensors else torch.float16
    has_generation = (folder / "generation_config.json").is_file()
    generation = GenerationConfig.from_pretrained(folder, local_files_only=True) if has_generation else None
    return Source(name, config, architecture, tensors, _stored(dtype), _tokenizer(folder), generation)


def _open_gguf(path: Path) -> Source:
    with path.open("rb") as file:
        if file.read(4) != b"GGUF" or path.stat().st_size < 1024:
            raise ValueError(f"{path}: not a GGUF file, or one cut short")
    try:
        config = AutoConfig.from_pretrained(path.parent, gguf_file=path.name, local_files_only=True)
        tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name, local_files_only=True)
    except ImportError as error:
        raise ValueError(f"{path}: reading GGUF needs the package gguf: pip install gguf") from error
    except (ValueError, KeyError, OSError, IndexError) as error:
        raise ValueError(f"{path}: not a GGUF model that transformers reads: {str(error).splitlines()[0]}") from error
    if hasattr(config, "quantization_config"):
        del config.quantization_config  # it says how the GGUF was stored, which no longer holds
    architecture = Architecture.of(config, str(path))
    config.architectures = [architecture.family.causal_lm]
    tensors = GgufTensors(path, architecture.heads, architecture.kv_heads)
    return Source(str(path), config, architecture, tensors, torch.float16, tokenizer, GenerationConfig.from_model_config(config))


def _stored(dtype: torch.dtype) -> torch.dtype:
    """Type for the unquantized tensors: half precision as the model has it, FP16 for float32 models."""
    return dtype if dtype in (torch.float16, torch.bfloat16) else torch.float16


def _tokenizer(folder: Path) -> Any:
    if not any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "vocab.json")):
        return None
    try:
        return AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except (ValueError, KeyError, OSError) as error:
        raise ValueError(f"{folder}: the tokenizer cannot be read: {str(error).splitlines()[0]}") from error
