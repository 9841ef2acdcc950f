"""The model to be quantized: config, tokenizer, and its tensors one at a time.

Tensors come from safetensors (a Hugging Face folder or hub id) or a memory-mapped GGUF file, one decoder block at a
time; no pickle is ever loaded, and no code that comes with a model.
"""

import hashlib
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError
from transformers import AutoConfig, AutoTokenizer, GenerationConfig

from rosaq.architecture import EMBEDDING, FINAL_NORM, HEAD, LINEARS, Architecture
from rosaq.gguf_file import GgufTensors
from rosaq.provenance import UNKNOWN, Provenance, of_folder, of_gguf
from rosaq.safetensors_folder import SafetensorsFolder, read_json

HUB_FILES = ["*.json", "*.safetensors", "tokenizer*", "*.model", "*.jinja", "LICENSE*", "README.md"]
HUB_SECOND_COPIES = ["consolidated*", "original/*"]  # of the weights, as their publisher's own code reads them
READERS = 4  # threads that read the tensors of the next block


@dataclass(frozen=True)
class Source:
    """An unquantized causal language model.

    Attributes:
        name: what the user called it (hub id, folder or file).
        config: transformers config, without the loader's traces.
        architecture: its sizes.
        tensors: name -> tensor; reading is lazy for safetensors.
        dtype: type that unquantized tensors of the checkpoint are stored in.
        tokenizer: transformers' tokenizer, or None where the model has none.
        generation_config: transformers' defaults for generation, or None.
        files: that the tensors are read from.
        half: the model itself is in float16 or bfloat16.
        origin: what the model says of its license and its place on the hub.
    """

    name: str
    config: Any
    architecture: Architecture
    tensors: Mapping[str, torch.Tensor]
    dtype: torch.dtype
    tokenizer: Any = field(repr=False, default=None)
    generation_config: GenerationConfig | None = field(repr=False, default=None)
    files: tuple[Path, ...] = field(repr=False, default=())
    half: bool = False
    origin: Provenance = field(repr=False, default=UNKNOWN)

    @property
    def public_name(self) -> str:
        """What to call the model where others read it: its hub id, or the last part of a local path."""
        return self.name if self.name == self.origin.hub_id else Path(os.path.abspath(Path(self.name).expanduser())).name

    def read(self, name: str) -> torch.Tensor:
        """One tensor, on the CPU.

        Raises:
            ValueError: the tensor is missing, cannot be read, or is not of a floating type; names it.
        """
        if name not in self.tensors:
            raise ValueError(f"{self.name}: tensor {name!r} is missing")
        tensor = self.tensors[name]
        if not tensor.is_floating_point() or tensor.itemsize < 2:
            raise ValueError(f"{self.name}: tensor {name!r} is of type {tensor.dtype}; only float16, bfloat16 and float32 weights can be quantized")
        return tensor

    def check_finite(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Refuse NaN and Inf in tensors, by full name, wherever they lie.

        Raises:
            ValueError: a tensor holds NaN or Inf; names it.
        """
        finite = torch.stack([torch.isfinite(tensor).all() for tensor in tensors.values()])
        for name, good in zip(tensors, finite.tolist(), strict=True):
            if not good:
                raise ValueError(f"{self.name}: tensor {name!r} holds NaN or Inf")

    def tensor(self, name: str, shape: tuple[int, ...] | None = None) -> torch.Tensor:
        """One tensor, on the CPU, checked to be finite and, where it is given, of this shape.

        Raises:
            ValueError: the tensor is missing, not of a floating type, of another shape, or holds NaN or Inf; names it.
        """
        tensor = self.read(name)
        if shape is not None and tensor.shape != shape:
            raise ValueError(f"{self.name}: tensor {name!r} has shape {tuple(tensor.shape)}; config.json asks for {shape}")
        self.check_finite({name: tensor})
        return tensor

    def biases(self) -> frozenset[str]:
        """Roles whose linear layer has a bias, in the first decoder block."""
        prefix = self.architecture.block_prefix(0)
        return frozenset(role for role, module in LINEARS.items() if f"{prefix}{module}.bias" in self.tensors)

    def block_names(self, index: int) -> list[str]:
        """Full names of the tensors of decoder block `index`.

        Raises:
            ValueError: one is missing or unknown; names it.
        """
        prefix = self.architecture.block_prefix(index)
        names = [name for name in self.tensors if name.startswith(prefix)]
        for required in self.architecture.required():
            if prefix + required not in names:
                raise ValueError(f"{self.name}: tensor {prefix + required!r} is missing")
        known = {*self.architecture.required(), *self.architecture.family.optional}
        for name in names:
            if name.removeprefix(prefix) not in known and not name.endswith("rotary_emb.inv_freq"):
                raise ValueError(f"{self.name}: tensor {name!r} is unknown in a {self.architecture.family.model_type} block")
        return [name for name in names if not name.endswith("rotary_emb.inv_freq")]

    def block(self, index: int, device: str = "cpu") -> dict[str, torch.Tensor]:
        """All tensors of decoder block `index`, by their name within the block, on a device."""
        return next(iter(self.blocks([index], device)))

    def blocks(self, indices: Iterable[int], device: str = "cpu") -> Iterator[dict[str, torch.Tensor]]:
        """The tensors of these decoder blocks, one block after the other, on a device; the next block is read meanwhile.

        Host memory: two blocks.

        Raises:
            ValueError: as `tensor`; names the tensor.
        """
        pinned = device.startswith("cuda")
        with ThreadPoolExecutor(READERS) as pool:
            ahead: tuple[int, dict[str, Future[torch.Tensor]]] | None = None
            for index in [*indices, None]:
                begun = None if index is None else (index, {n: pool.submit(self._read_ahead, n, pinned) for n in self.block_names(index)})
                if ahead is not None:
                    yield self._arrived(*ahead, device)
                ahead = begun

    def _read_ahead(self, name: str, pinned: bool) -> torch.Tensor:
        tensor = self.read(name)
        return tensor.pin_memory() if pinned else tensor

    def _arrived(self, index: int, reading: dict[str, "Future[torch.Tensor]"], device: str) -> dict[str, torch.Tensor]:
        tensors = {name: future.result().to(device, non_blocking=True) for name, future in reading.items()}
        prefix = self.architecture.block_prefix(index)
        for name, tensor in tensors.items():
            wanted = self.architecture.tensor_shape(name.removeprefix(prefix))
            if tensor.shape != wanted:
                raise ValueError(f"{self.name}: tensor {name!r} has shape {tuple(tensor.shape)}; config.json asks for {wanted}")
        self.check_finite(tensors)
        return {name.removeprefix(prefix): tensor for name, tensor in tensors.items()}

    def check_names(self) -> None:
        """Refuse tensors that a model of these sizes does not have, such as blocks behind the last one.

        Raises:
            ValueError: there is one; names it.
        """
        known = {f"{module}.weight" for module in (EMBEDDING, FINAL_NORM, HEAD)}
        for name in self.tensors:
            block = re.match(r"model\.layers\.(\d+)\.", name)
            if name not in known and (block is None or str(int(block[1])) != block[1] or int(block[1]) >= self.architecture.layers):
                raise ValueError(f"{self.name}: tensor {name!r} has no place in a model of {self.architecture.layers} blocks")

    def identity(self) -> dict[str, Any]:
        """What tells this model from another: a hash of its config; name, size and time of every file."""
        files = {file.name: f"{file.stat().st_size} bytes, changed {file.stat().st_mtime_ns}" for file in self.files}
        return {"config": hashlib.sha256(self.config.to_json_string().encode()).hexdigest(), "files": files, "tensors": len(self.tensors)}

    def embedding(self) -> torch.Tensor:
        """Embedding table (vocabulary, hidden)."""
        return self.tensor(f"{EMBEDDING}.weight", (self.architecture.vocabulary, self.architecture.hidden))

    def head(self) -> torch.Tensor:
        """Weight of lm_head (vocabulary, hidden); the embedding table itself in a tied model."""
        if self.architecture.tied:
            return self.embedding()
        return self.tensor(f"{HEAD}.weight", (self.architecture.vocabulary, self.architecture.hidden))

    def final_norm(self) -> torch.Tensor:
        """Weight of the norm before lm_head (hidden,)."""
        return self.tensor(f"{FINAL_NORM}.weight", (self.architecture.hidden,))

    def parameters(self) -> int:
        """Weights of the model, a tied table counted once."""
        a = self.architecture
        block = sum(torch.Size(a.shape(role)).numel() for role in LINEARS) + 2 * a.hidden
        return block * a.layers + a.vocabulary * a.hidden * (1 if a.tied else 2) + a.hidden


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
    if not is_hub_id(model):
        raise ValueError(f"{model}: no such folder or file, and not a hub id of the form owner/name")
    return _open_folder(_download(model, HUB_FILES), model, model)


def is_hub_id(model: str) -> bool:
    """Whether a model is named as on the hub, and is nothing that lies here."""
    path = Path(model).expanduser()
    return path.suffix != ".gguf" and not path.exists() and re.fullmatch(r"[\w.-]+/[\w.-]+", model) is not None


def read_hub_config(model: str) -> tuple[Any, torch.dtype]:
    """The transformers config of a model on the hub, of which nothing else is downloaded; and the type that its weights are said to have.

    Raises:
        ValueError: as `open_source`.
    """
    config = _read_config(_download(model, ["config.json"]), model)
    return config, getattr(config, "dtype", None) or torch.float16


def _download(repository: str, files: list[str]) -> Path:
    try:
        return Path(snapshot_download(repository, allow_patterns=files, ignore_patterns=HUB_SECOND_COPIES))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise ValueError(f"{repository}: not a local path, and the hub did not give it: {_told(error)}") from error


def _read_config(folder: Path, name: str) -> Any:
    if not (folder / "config.json").is_file():
        raise ValueError(f"{folder}: no config.json, so this is not a model folder")
    raw = read_json(folder / "config.json")
    if quantized := raw.get("quantization_config"):
        method = quantized.get("quant_method") if isinstance(quantized, dict) else quantized
        raise ValueError(f"{name}: already quantized ({method}); give the original model")
    if "model_type" not in raw:
        raise ValueError(f"{folder / 'config.json'}: no model_type, so this is not a transformers model")
    try:
        return AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # of many kinds, by what is wrong
        raise ValueError(f"{folder / 'config.json'}: transformers cannot read it: {_told(error)}") from error


def _open_folder(folder: Path, name: str, hub_id: str | None = None) -> Source:
    config = _read_config(folder, name)
    architecture = Architecture.of(config, name)
    tensors = SafetensorsFolder(folder)
    place = tensors.places.get(f"{EMBEDDING}.weight")
    dtype = torch.float16 if place is None else place.dtype
    has_generation = (folder / "generation_config.json").is_file()
    try:
        generation = GenerationConfig.from_pretrained(folder, local_files_only=True) if has_generation else None
    except Exception as error:
        raise ValueError(f"{folder / 'generation_config.json'}: transformers cannot read it: {_told(error)}") from error
    files, half, origin = tuple(tensors.files), _stored(dtype) == dtype, of_folder(folder, hub_id)
    return Source(name, config, architecture, tensors, _stored(dtype), read_tokenizer(folder), generation, files, half, origin)


def _open_gguf(path: Path) -> Source:
    with path.open("rb") as file:
        if file.read(4) != b"GGUF" or path.stat().st_size < 1024:
            raise ValueError(f"{path}: not a GGUF file, or one cut short")
    try:
        config = AutoConfig.from_pretrained(path.parent, gguf_file=path.name, local_files_only=True, trust_remote_code=False)
        tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name, local_files_only=True, trust_remote_code=False)
    except ImportError as error:
        raise ValueError(f"{path}: reading GGUF needs the package gguf: pip install gguf") from error
    except Exception as error:  # of many kinds, by where the file is cut or corrupt
        raise ValueError(f"{path}: not a GGUF model that transformers reads, or truncated or corrupt: {_told(error)}") from error
    if hasattr(config, "quantization_config"):
        del config.quantization_config  # it says how the GGUF was stored, which no longer holds
    architecture = Architecture.of(config, str(path))
    config.architectures = [architecture.family.causal_lm]
    tensors = GgufTensors(path, architecture.heads, architecture.kv_heads)
    generation, origin = GenerationConfig.from_model_config(config), of_gguf(tensors.fields)
    return Source(str(path), config, architecture, tensors, torch.float16, tokenizer, generation, (path,), origin=origin)


def _stored(dtype: torch.dtype) -> torch.dtype:
    """Type for the unquantized tensors: half precision as the model has it, FP16 for float32 models."""
    return dtype if dtype in (torch.float16, torch.bfloat16) else torch.float16


def read_tokenizer(folder: Path) -> Any:
    """The tokenizer of a model's folder, None where it has none.

    Raises:
        ValueError: there is one that transformers cannot read.
    """
    if not any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "vocab.json")):
        return None
    try:
        return AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:
        raise ValueError(f"{folder}: the tokenizer cannot be read: {_told(error)}") from error


def _told(error: Exception) -> str:
    """An error of a library on one line, cut where it goes on at length."""
    return " ".join(str(error).split())[:300] or type(error).__name__
