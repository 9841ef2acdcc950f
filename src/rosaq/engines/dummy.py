"""Models of random weights: a layer, a whole model, or a folder that an engine fills itself; for speed and memory, where values do not matter.

Nothing is quantized: stored tensors are drawn as they are, so that a model of any size is made in seconds. Scales are such
that a layer's outputs have about the size of its inputs, and every value in the model stays finite.
"""

import copy
from pathlib import Path
from typing import Any

import torch

from rosaq.architecture import LINEARS, Architecture
from rosaq.checkpoint import quantization_config
from rosaq.checkpoint_writer import CheckpointWriter
from rosaq.embedding import RosaqEmbedding
from rosaq.engines.joined import join_layers
from rosaq.engines.transformers import RosaqConfig, RosaqQuantizer
from rosaq.layout import LinearLayout
from rosaq.linear import RosaqLinear
from rosaq.norm import RotatedNorm
from rosaq.plan import make_plan
from rosaq.recipe import Recipe
from rosaq.skeleton import materialize_rotary, meta_model


def random_tensors(layout: LinearLayout, device: torch.device | str, seed: int = 0) -> dict[str, torch.Tensor]:
    """Stored tensors of a random layer whose outputs have about the size of its inputs."""
    generator = torch.Generator(device=device).manual_seed(seed)
    step = layout.code_step
    size = layout.in_features**-0.5 / (step << layout.bits) * 4

    def random(name: str, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        if name == "order":
            return torch.randperm(shape[0], generator=generator, device=device).to(dtype)
        if name == "zeros":  # near the middle of the codes' range, as calibration gives
            middle, places = (step << layout.bits) // 2 - step // 2, range(0, 32, layout.zero_bits)
            spread = torch.randint(-1, 2, (len(places), *shape), generator=generator, device=device)
            word = sum((middle + spread[i]) << place for i, place in enumerate(places))
            return torch.as_tensor(word).to(dtype)
        if dtype == torch.int32:
            return torch.randint(-(1 << 31), (1 << 31) - 1, shape, generator=generator, device=device).to(dtype)
        if dtype == torch.int8:
            return torch.randint(-127, 128, shape, generator=generator, device=device).to(dtype)
        if name in ("scales", "salient_scales"):
            unit = size if name == "scales" else layout.in_features**-0.5 / 64
            return ((0.5 + torch.rand(shape, generator=generator, device=device)) * unit).to(dtype)
        return (torch.randn(shape, generator=generator, device=device) * layout.in_features**-0.5).to(dtype)

    return {name: random(name, shape, dtype) for name, (shape, dtype) in layout.tensors().items()}


def dummy_config(config: Any, recipe: Recipe, dtype: torch.dtype) -> Any:
    """The config of a checkpoint that this recipe makes of a model of this config, without a calibration."""
    if recipe.target_bits and not recipe.allocation:
        raise ValueError(f"recipe {recipe.name!r}: what target_bits gives each layer is found on calibration text; random weights take none")
    architecture = Architecture.of(config)
    biases = frozenset(role for role, module in LINEARS.items() if getattr(_block(config).get_submodule(module), "bias", None) is not None)
    plan = make_plan(recipe, architecture, biases)
    dummy = copy.deepcopy(config)
    dummy.tie_word_embeddings, dummy.dtype, dummy.architectures = plan.tied, dtype, [architecture.family.causal_lm]
    dummy.quantization_config = quantization_config(plan, recipe.to_dict(), {"text": "none: random weights"})
    return dummy


def dummy_model(config: Any, dtype: torch.dtype, device: str) -> Any:
    """Make transformers' model of a config, quantized where it says so, with random weights on `device`."""
    model = meta_model(config)
    quantized = getattr(config, "quantization_config", None)
    if quantized is not None:
        with torch.device("meta"):
            RosaqQuantizer(RosaqConfig.from_dict(quantized)).preprocess_model(model)
    for name, parameter in list(model.named_parameters()):
        owner, _, leaf = name.rpartition(".")
        values = torch.ones(parameter.shape, dtype=dtype, device=device)
        if parameter.dim() > 1:
            values.normal_(0, parameter.shape[-1] ** -0.5)
        setattr(model.get_submodule(owner), leaf, torch.nn.Parameter(values, requires_grad=False))
    for module in model.modules():
        if isinstance(module, RosaqLinear | RosaqEmbedding):
            for name, tensor in random_tensors(module.layout, device).items():
                setattr(module, name, tensor)
        if isinstance(module, RosaqEmbedding):
            module.dtype = dtype
        if isinstance(module, RotatedNorm):
            module.rotation = torch.eye(len(module.weight), dtype=torch.float16, device=device)
    join_layers(model)
    materialize_rotary(model, device)
    model.tie_weights()
    return model.eval()


def write_dummy(config: Any, folder: str | Path) -> None:
    """Write a checkpoint of random weights that `from_pretrained` loads: config with `quantization_config`, one hash per shard."""
    model = dummy_model(config, config.dtype, "cpu")
    with CheckpointWriter(folder) as writer:
        tied = set(getattr(model, "all_tied_weights_keys", None) or {})
        writer.add({name: tensor for name, tensor in model.state_dict().items() if name not in tied})
        writer.finish(config, {}, {}, [])


def _block(config: Any) -> Any:
    return meta_model(config).model.layers[0]
