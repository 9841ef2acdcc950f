"""The layers of a rosaq checkpoint in vLLM: its config, its linear layers, its embedding.

vLLM computes q, k, v as one layer and gate, up as another, and cuts layers over tensor-parallel ranks. Each stored tensor is
handed to a loader of ours, which keeps this rank's share of it (`shards.py`); when all are there, the shares of a layer
become one `RosaqLinear`, so a layer runs the kernel that rosaq chooses. vLLM notices no missing tensor of a quantized model, so
shares are checked for completeness, and a local checkpoint is compared whole with its config before an engine starts. With
`--load-format dummy` the shares are random.
"""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any
from weakref import WeakValueDictionary

import torch
from torch.nn import Parameter
from transformers import AutoConfig
from vllm.config import get_current_vllm_config
from vllm.model_executor.layers.linear import (
    LinearBase,
    LinearMethodBase,
    MergedColumnParallelLinear,
    QKVParallelLinear,
    RowParallelLinear,
    UnquantizedLinearMethod,
)
from vllm.model_executor.layers.quantization import register_quantization_config
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig, QuantizeMethodBase
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead, VocabParallelEmbedding
from vllm.platforms import current_platform
from vllm.utils.torch_utils import direct_register_custom_op
from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend

from rosaq.architecture import EMBEDDING, HEAD
from rosaq.embedding import RosaqEmbedding
from rosaq.engines.dummy import random_tensors
from rosaq.engines.shards import Shard, join
from rosaq.engines.transformers import METHOD, RosaqConfig, RosaqQuantizer
from rosaq.layout import LinearLayout
from rosaq.linear import RosaqLinear
from rosaq.skeleton import meta_model

# vLLM's names of the layers in a joined one: none, q, k, v, or gate and up by number.
PARTS: dict[str | int | None, int] = {None: 0, "q": 0, "k": 1, "v": 2, 0: 0, 1: 1}

# Layers by the address of their key tensor; see `rosaq_linear`.
_LAYERS: WeakValueDictionary[int, RosaqLinear] = WeakValueDictionary()


class RosaqVllmConfig(QuantizationConfig):
    """vLLM's view of `quantization_config`, read and checked by `RosaqConfig`."""

    def __init__(self, config: RosaqConfig) -> None:
        """Refuse what only transformers can run."""
        super().__init__()
        if config.rotated_norms:
            raise ValueError(
                f"recipe {config.recipe['name']!r} rotates after each norm at run time, which vLLM's norms cannot; load it with transformers"
            )
        if config.hadamard_inputs:
            raise ValueError(
                f"recipe {config.recipe['name']!r} multiplies the inputs of W_down by a Hadamard matrix at run time, which vLLM's layers "
                "cannot; load it with transformers"
            )
        if config.rotated_inputs:
            raise ValueError(
                f"recipe {config.recipe['name']!r} rotates the inputs of o_proj at run time, which vLLM's layers cannot; load it with transformers"
            )
        self.config = config

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> "RosaqVllmConfig":
        """Out of config.json's `quantization_config`; an unknown or missing key or another format version is a ValueError."""
        return cls(RosaqConfig.from_dict(config))

    @classmethod
    def get_name(cls) -> str:
        """The method's name."""
        return METHOD

    @classmethod
    def get_min_capability(cls) -> int:
        """Any GPU: where rosaq's kernels cannot run a layer, its plain path does."""
        return 70

    def get_supported_act_dtypes(self) -> list[torch.dtype]:
        """Types that a model can be served in."""
        return [torch.bfloat16, torch.float16, torch.float32]

    @staticmethod
    def get_config_filenames() -> list[str]:
        """None: everything is in config.json."""
        return []

    def maybe_update_config(self, model_name: str, hf_config: Any = None, revision: str | None = None) -> None:
        """Compare the files of a local checkpoint with its config before anything is started.

        Raises:
            ValueError: a tensor is missing, unknown, or of another shape or type; names it.
        """
        files = [str(file) for file in sorted(Path(model_name).glob("model*.safetensors"))]
        if files:
            config = AutoConfig.from_pretrained(model_name, local_files_only=True, trust_remote_code=False)
            RosaqQuantizer(self.config).preprocess_model(meta_model(config), checkpoint_files=files)

    def get_quant_method(self, layer: torch.nn.Module, prefix: str) -> QuantizeMethodBase | None:
        """How a layer is computed; None leaves it to vLLM."""
        if isinstance(layer, ParallelLMHead):
            return self._table(HEAD, layer, RosaqLinearMethod)
        if isinstance(layer, VocabParallelEmbedding):  # some models give it no name
            return self._table(EMBEDDING, layer, RosaqEmbeddingMethod)
        if not isinstance(layer, LinearBase):
            return None
        parent, _, name = prefix.rpartition(".")
        modules = [f"{parent}.{part}" if parent else part for part in self.packed_modules_mapping.get(name, [name])]
        forms = [self.config.layout(module, (layer.output_size, layer.input_size), False) for module in modules]
        if forms[0] is None and not any(forms):
            return UnquantizedLinearMethod()
        for module, form in zip(modules, forms, strict=True):
            if form != forms[0]:
                raise ValueError(f"{module} and {modules[0]} are stored in different forms, but vLLM computes them as one layer, {prefix}")
        return RosaqLinearMethod(self.config, modules)

    def _table(self, module: str, layer: Any, method: "type[RosaqLinearMethod]") -> QuantizeMethodBase | None:
        form = self.config.layout(module, (layer.org_vocab_size, layer.embedding_dim), False)
        return None if form is None else method(self.config, [module])


class RosaqLinearMethod(LinearMethodBase):
    """Loads and computes one of vLLM's linear layers, which may be several stored ones.

    Args:
        config: the checkpoint's.
        modules: names of the stored layers, in the order of their outputs.
    """

    def __init__(self, config: RosaqConfig, modules: list[str]) -> None:
        """Keep what the layer is made of."""
        self.config, self.modules = config, modules

    def create_weights(
        self,
        layer: Any,
        input_size_per_partition: int,
        output_partition_sizes: list[int],
        input_size: int,
        output_size: int,
        params_dtype: torch.dtype,
        **extra: Any,
    ) -> None:
        """Give the layer an empty parameter for every stored tensor, whose loader keeps this rank's share."""
        shards = []
        for module, total, rows in zip(self.modules, _stored_outputs(layer), output_partition_sizes, strict=True):
            form = self.config.layout(module, (total, input_size), False)
            assert form is not None
            parts = input_size // input_size_per_partition
            outputs = _outputs(layer, total, rows)
            shards.append(Shard(module, form, outputs, rows, layer.tp_rank if parts > 1 else 0, parts))
        layer.rosaq_shards, layer.rosaq_dtype = shards, params_dtype
        layer.rosaq_dummy = get_current_vllm_config().load_config.load_format == "dummy"
        layer.rosaq_biased = set(range(len(shards))) if layer.rosaq_dummy else set()
        for name, (_, dtype) in shards[0].stored.tensors().items():
            parameter = Parameter(torch.empty(0, dtype=dtype), requires_grad=False)
            parameter.weight_loader = _loader(shards, name)  # type: ignore[attr-defined]
            layer.register_parameter(name, parameter)
        # The bias is vLLM's own parameter, made after this with whatever loader the layer then has.
        layer.weight_loader = _counted(layer.weight_loader, layer.rosaq_biased)

    def process_weights_after_loading(self, layer: Any) -> None:
        """Join the shares and prepare the kernel; what was loaded is dropped."""
        if getattr(layer, "bias", None) is not None:
            for part, module in enumerate(self.modules):
                if part not in layer.rosaq_biased:
                    raise ValueError(f"tensor '{module}.bias' is missing from the checkpoint")
        layout, tensors = self._joined(layer)
        if (bias := _added_bias(layer)) is not None:
            tensors["bias"] = bias
        linear = RosaqLinear(replace(layout, bias=bias is not None), device="meta")
        for name, tensor in tensors.items():
            setattr(linear, name, tensor)
        device = tensors["qweight"].device
        tensors.clear()
        linear.repack(layer.rosaq_dtype, free=True)
        # Not a submodule: whatever moves or walks the layer's modules has nothing to find in it.
        layer.__dict__["rosaq_linear"] = linear
        layer.qweight = Parameter(torch.zeros(1, dtype=torch.int32, device=device), requires_grad=False)
        _LAYERS[layer.qweight.data_ptr()] = linear
        if isinstance(layer, VocabParallelEmbedding):
            _show_device(layer, device)

    def apply(self, layer: Any, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        """The product (..., N) of x (..., K), with the bias where vLLM gives it: then the kernel adds it."""
        assert (bias is not None) == layer.rosaq_linear.layout.bias
        return torch.ops.vllm.rosaq_linear(x, layer.qweight, layer.rosaq_linear.out_features)

    def _joined(self, layer: Any) -> tuple[LinearLayout, dict[str, torch.Tensor]]:
        if layer.rosaq_dummy:  # `--load-format dummy`: no tensor was handed over
            for shard in layer.rosaq_shards:
                shard.tensors = random_tensors(shard.layout, layer.qweight.device)
        for name in layer.rosaq_shards[0].stored.tensors():
            delattr(layer, name)
        layout, tensors = join(layer.rosaq_shards)
        del layer.rosaq_shards
        return layout, tensors


class RosaqEmbeddingMethod(RosaqLinearMethod):
    """Loads and looks up a quantized embedding table."""

    def process_weights_after_loading(self, layer: Any) -> None:
        """Put the share into a `RosaqEmbedding`."""
        layout, tensors = self._joined(layer)
        table = RosaqEmbedding(layout, layer.rosaq_dtype, device="meta")
        for name, tensor in tensors.items():
            setattr(table, name, tensor)
        layer.rosaq_table = table
        _show_device(layer, table.get_buffer("qweight").device)

    def embedding(self, layer: Any, input_: torch.Tensor) -> torch.Tensor:
        """Embeddings (..., hidden) of token ids (...), counted from the rank's first."""
        return layer.rosaq_table(input_)


def rosaq_linear(x: torch.Tensor, key: torch.Tensor, outputs: int) -> torch.Tensor:
    """The product of the layer that `key` belongs to: one opaque operation for compilers and graph capture.

    The layer is found by the address of its key tensor rather than by a name, because an address is no constant of the
    compiled graph: the blocks of a model then share one. Reading an address waits for no device.
    """
    return _LAYERS[key.data_ptr()](x).contiguous()


def _rosaq_linear_fake(x: torch.Tensor, key: torch.Tensor, outputs: int) -> torch.Tensor:
    return x.new_empty((*x.shape[:-1], outputs))


def _show_device(layer: Any, device: torch.device) -> None:
    """Give a table the `weight` that vLLM's adapters ask for its device and type, and for nothing else."""
    layer.weight = Parameter(torch.zeros(1, dtype=layer.rosaq_dtype, device=device), requires_grad=False)


def _added_bias(layer: Any) -> torch.Tensor | None:
    """The bias that vLLM will hand to `apply`, on every call or never: row layers have it on one rank only."""
    bias = getattr(layer, "bias", None)
    elsewhere = isinstance(layer, RowParallelLinear) and layer.tp_rank > 0
    return None if bias is None or layer.skip_bias_add or elsewhere else bias.detach()


def _stored_outputs(layer: Any) -> list[int]:
    """Outputs of each stored layer as it is in the checkpoint; a layer's own sizes count k and v once per rank that has a copy."""
    if isinstance(layer, QKVParallelLinear):
        keys = layer.total_num_kv_heads * layer.head_size
        return [layer.total_num_heads * layer.head_size, keys, keys]
    if isinstance(layer, MergedColumnParallelLinear):
        return list(layer.output_sizes)
    return [layer.org_vocab_size if isinstance(layer, VocabParallelEmbedding) else layer.output_size]


def _outputs(layer: Any, total: int, rows: int) -> range:
    """Which of a stored layer's outputs this rank computes, `rows` of them (fewer where a vocabulary is padded)."""
    if isinstance(layer, VocabParallelEmbedding):
        return range(layer.shard_indices.org_vocab_start_index, layer.shard_indices.org_vocab_end_index)
    cuts = total // rows
    if cuts == 1:
        return range(total)
    index = layer.tp_rank // (layer.tp_size // cuts)  # k and v have fewer cuts than ranks where heads are copied
    return range(index * rows, (index + 1) * rows)


def _loader(shards: list[Shard], name: str) -> Callable[..., None]:
    def load(parameter: Parameter, tensor: torch.Tensor, shard_id: str | int | None = None) -> None:
        shards[PARTS[shard_id]].take(name, tensor, parameter.device)

    return load


def _counted(loader: Callable[..., None], arrived: set[int]) -> Callable[..., None]:
    def load(parameter: Parameter, tensor: torch.Tensor, *shard_id: str | int | None) -> None:
        loader(parameter, tensor, *shard_id)
        arrived.add(PARTS[shard_id[0] if shard_id else None])

    return load


def register_with_vllm() -> None:
    """Register the config, the operation and, on CUDA, the attention; once per process."""
    if hasattr(torch.ops.vllm, "rosaq_linear"):
        return
    direct_register_custom_op("rosaq_linear", rosaq_linear, fake_impl=_rosaq_linear_fake)
    register_quantization_config(METHOD)(RosaqVllmConfig)
    if current_platform.is_cuda() and not AttentionBackendEnum.CUSTOM.is_overridden():  # vLLM's one place for an attention of others
        register_backend(AttentionBackendEnum.CUSTOM, "rosaq.engines.vllm_attention.RosaqAttentionBackend")
