"""transformers loads a rosaq checkpoint: `from_pretrained` with nothing but `import rosaq` before it.

transformers has no entry points for quantizers, so registration happens when rosaq is imported. The model is built on
the meta device, its linear layers are replaced by their quantized form, and the checkpoint's tensors go straight into
these; no full-precision copy ever exists. transformers itself neither notices missing nor unknown tensors of a
quantized model, so names, shapes and types are compared with the files' headers here.
"""

from pathlib import Path
from typing import Any

import torch
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from rosaq.architecture import Architecture
from rosaq.checkpoint import check_version
from rosaq.embedding import RosaqEmbedding
from rosaq.engines.joined import join_layers
from rosaq.hadamard_linear import HadamardLinear
from rosaq.layout import LinearLayout
from rosaq.linear import RosaqLinear, RotatedLinear
from rosaq.norm import RotatedNorm
from rosaq.recipe import Recipe
from rosaq.safetensors_folder import open_safetensors, read_json

METHOD = "rosaq"
_TYPES = {"I32": torch.int32, "I8": torch.int8, "F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32}


class RosaqConfig(QuantizationConfigMixin):
    """`quantization_config` of a checkpoint: format version, recipe, calibration, and the form of every layer."""

    def __init__(
        self,
        format_version: int,
        recipe: dict[str, Any],
        layouts: dict[str, dict[str, Any]],
        calibration: dict[str, Any] | None = None,
        rotated_norms: list[str] | None = None,
        hadamard_inputs: list[str] | None = None,
        rotated_inputs: list[str] | None = None,
        **unknown: Any,
    ) -> None:
        """Check every part; an unknown key is an error."""
        unknown.pop("quant_method", None)
        if unknown:
            raise ValueError(f"quantization_config: unknown key {sorted(unknown)[0]!r}; it was written by another version of rosaq")
        check_version(format_version, "quantization_config")
        for name, value in (("recipe", recipe), ("layouts", layouts), ("calibration", calibration or {})):
            if not isinstance(value, dict):
                raise ValueError(f"quantization_config: {name} is {value!r}; it must be an object")
        Recipe.from_dict(recipe, "quantization_config.recipe")
        self.quant_method = METHOD  # type: ignore[assignment]
        self.format_version = format_version
        self.recipe = recipe
        self.calibration = calibration or {}
        self.layouts = layouts
        self.rotated_norms = rotated_norms or []
        self.rotated_inputs = rotated_inputs or []
        self.hadamard_inputs = hadamard_inputs or []

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], return_unused_kwargs: bool = False, **kwargs: Any) -> Any:
        """Read what config.json says; a key that is missing is an error."""
        missing = sorted({"format_version", "recipe", "layouts"} - set(config_dict))
        if missing:
            raise ValueError(f"quantization_config: the key {missing[0]!r} is missing")
        return super().from_dict(config_dict, return_unused_kwargs, **kwargs)

    @classmethod
    def of(cls, folder: str | Path) -> "RosaqConfig":
        """That of the checkpoint in a folder.

        Raises:
            ValueError: it is not valid; names the file.
        """
        file = Path(folder) / "config.json"
        try:
            read: RosaqConfig = cls.from_dict(read_json(file)["quantization_config"])
        except ValueError as error:
            raise ValueError(f"{file}: {error}") from error
        return read

    def to_dict(self) -> dict[str, Any]:
        """What config.json says; which inputs are rotated only where there are any, as the pipeline writes it."""
        return {key: value for key, value in super().to_dict().items() if value or key not in ("rotated_inputs", "hadamard_inputs")}

    def layout(self, module: str, shape: tuple[int, int], bias: bool) -> LinearLayout | None:
        """The form of a module of (outputs, inputs), or None where it is not quantized.

        A form belongs to a full module name, or to a name within a decoder block, where the full one has none.
        """
        form = self.layouts.get(module, self.layouts.get(module.split(".", 3)[-1] if module.startswith("model.layers.") else module))
        if form is None:
            return None
        try:
            return LinearLayout(*shape, bias=bias, **form)
        except (TypeError, ValueError) as error:
            raise ValueError(f"quantization_config: the form of {module} is not valid: {error}") from error


class RosaqQuantizer(HfQuantizer):
    """Replaces the quantized modules before loading, after comparing them with the files."""

    requires_calibration = True

    def _process_model_before_weight_loading(self, model: Any, checkpoint_files: list[str] | None = None, **_: Any) -> Any:
        Architecture.of(model.config, model.config._name_or_path or "the checkpoint")
        dtype = torch.get_default_dtype()
        for name, module in list(model.named_modules()):
            replacement = self._replacement(name, module, dtype)
            if replacement is not None:
                model.set_submodule(name, replacement)
        if checkpoint_files:
            check_tensors(model, [Path(file) for file in checkpoint_files])
        return model

    def _process_model_after_weight_loading(self, model: Any, **_: Any) -> Any:
        join_layers(model)
        return model

    def _replacement(self, name: str, module: torch.nn.Module, dtype: torch.dtype) -> torch.nn.Module | None:
        config: RosaqConfig = self.quantization_config  # type: ignore[assignment]
        if name.split(".", 3)[-1] in config.rotated_norms:
            weight = module.get_parameter("weight")
            return RotatedNorm(module, weight.shape[0])
        if not isinstance(module, torch.nn.Linear | torch.nn.Embedding):
            return None
        outputs, inputs = module.weight.shape
        layout = config.layout(name, (outputs, inputs), getattr(module, "bias", None) is not None)
        if layout is None:
            return None
        if isinstance(module, torch.nn.Embedding):
            return RosaqEmbedding(layout, dtype)
        within = name.split(".", 3)[-1]
        if within in config.hadamard_inputs:
            return HadamardLinear(layout)
        return RotatedLinear(layout) if within in config.rotated_inputs else RosaqLinear(layout)

    def get_weight_conversions(self) -> list[Any]:
        """None: names in the file are names in the model."""
        return []

    def is_serializable(self, **_: Any) -> bool:
        """`save_pretrained` writes the same tensors back."""
        return True

    @property
    def is_trainable(self) -> bool:
        """Adapters can be trained on top; the quantized weights themselves stay as they are."""
        return True

    @property
    def is_compileable(self) -> bool:
        """`generate` may compile with a static cache: a layer is one operation to the compiler."""
        return True


def check_tensors(model: Any, files: list[Path]) -> None:
    """Compare a checkpoint's tensors with what the model has.

    Raises:
        ValueError: a tensor is missing, unknown, or of another shape or type; names the file and the tensor.
    """
    found: dict[str, tuple[Path, tuple[int, ...], torch.dtype | None]] = {}
    for file in files:
        handle = open_safetensors(file)
        for name in handle.keys():  # noqa: SIM118  (not a mapping)
            part = handle.get_slice(name)
            found[name] = (file, tuple(part.get_shape()), _TYPES.get(part.get_dtype()))
    expected = {name: tensor for name, tensor in model.state_dict().items()}
    tied = set(getattr(model, "all_tied_weights_keys", None) or {})
    for name in sorted(set(expected) - set(found) - tied):
        raise ValueError(f"{files[0].parent}: tensor {name!r} is missing from the checkpoint")
    for name in sorted(set(found) - set(expected)):
        raise ValueError(f"{found[name][0]}: tensor {name!r} is unknown to this model")
    for name, (file, shape, dtype) in found.items():
        wanted = expected[name]
        if shape != tuple(wanted.shape):
            raise ValueError(f"{file}: tensor {name!r} has shape {shape}; the recipe asks for {tuple(wanted.shape)}")
        same_kind = dtype == wanted.dtype or (dtype is not None and dtype.is_floating_point and wanted.dtype.is_floating_point)
        if not same_kind:
            raise ValueError(f"{file}: tensor {name!r} is of type {dtype}; the format asks for {wanted.dtype}")


def register() -> None:
    """Make transformers know the format; a second call changes nothing."""
    AUTO_QUANTIZATION_CONFIG_MAPPING.setdefault(METHOD, RosaqConfig)
    AUTO_QUANTIZER_MAPPING.setdefault(METHOD, RosaqQuantizer)
