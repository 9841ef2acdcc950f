"""transformers' model of a source, without its weights or with them: one decoder block at a time, or whole."""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from rosaq.architecture import EMBEDDING, FINAL_NORM, HEAD
from rosaq.source import Source


def meta_model(config: Any) -> Any:
    """The causal language model of a config, on the meta device: modules, no memory.

    Raises:
        ValueError: transformers knows no such model, such as for a kind of rotary embedding that it does not have.
    """
    try:
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(config, attn_implementation="sdpa").eval()
    except (KeyError, TypeError, AttributeError, ZeroDivisionError) as error:
        raise ValueError(f"transformers cannot make a model of this config.json: {type(error).__name__}: {error}") from error


def full_model(source: Source, dtype: torch.dtype, device: str = "cpu") -> Any:
    """The whole source model with its weights in `dtype`: for evaluation and self-calibration of what fits."""
    names = {f"{EMBEDDING}.weight": source.embedding, f"{FINAL_NORM}.weight": source.final_norm, f"{HEAD}.weight": source.head}
    # Copied, because a source may hold its tensors: a change in place would be seen by every later read.
    state = {name: read().to(device, dtype, copy=True) for name, read in names.items()}
    for index in range(source.architecture.layers):
        prefix = source.architecture.block_prefix(index)
        state.update({prefix + name: tensor.to(device, dtype, copy=True) for name, tensor in source.block(index).items()})
    model = plain_model(source.config, state, dtype, device)
    if source.generation_config is not None:
        model.generation_config = source.generation_config
    return model


def plain_model(config: Any, tensors: dict[str, torch.Tensor], dtype: torch.dtype, device: str) -> Any:
    """The model of a config with these parameters, which are taken and not copied; all of them, in `dtype` on `device`."""
    model = meta_model(config).to(dtype)
    materialize_rotary(model, device)
    model.load_state_dict(tensors, assign=True)
    model.tie_weights()
    return model


def materialize_rotary(model: Any, device: str) -> None:
    """Compute the rotary tables, which are not in any checkpoint and are lost on the meta device."""
    with torch.device(device):
        model.model.rotary_emb = type(model.model.rotary_emb)(config=model.config)


class _Recorder(torch.nn.Module):
    """Stands in for a decoder block: keeps the arguments that the model calls it with and passes x on."""

    def __init__(self) -> None:
        super().__init__()
        self.arguments: dict[str, Any] = {}

    def forward(self, hidden_states: torch.Tensor, **arguments: Any) -> torch.Tensor:
        self.arguments = arguments
        return hidden_states


class BlockRunner:
    """Runs single decoder blocks of a model exactly as the whole model would, each with the weights it is given.

    Masks, positions and rotary embeddings come from the model's own forward pass, run once with recorders in the
    blocks' place, so nothing about a family's attention is repeated here.
    """

    def __init__(self, config: Any, seq_len: int, dtype: torch.dtype, device: str, change: Callable[[Any], object] = lambda model: None) -> None:
        """Prepare for windows of `seq_len` tokens, in `dtype` on `device`, after a change to the model's modules."""
        self._dtype = dtype
        model = meta_model(config)
        change(model)
        materialize_rotary(model, device)
        self._blocks = list(model.model.layers)
        recorders = [_Recorder() for _ in self._blocks]
        model.model.layers = torch.nn.ModuleList(recorders)
        model.model.norm = torch.nn.Identity()
        with torch.no_grad():  # not inference mode: `call` may be differentiated through these arguments
            model.model(inputs_embeds=torch.zeros(1, seq_len, config.hidden_size, dtype=dtype, device=device), use_cache=False)
        self._arguments = [recorder.arguments for recorder in recorders]

    def load(self, index: int, tensors: dict[str, torch.Tensor]) -> torch.nn.Module:
        """Block `index` with these weights, on the device and in the type, by their names in the block."""
        block = self._blocks[index]
        try:
            block.load_state_dict(tensors, assign=True)
        except RuntimeError as error:
            told = " ".join(str(error).split("\n\t")[-1].split())
            raise ValueError(f"decoder block {index}: config.json and the tensors do not fit together: {told}") from error
        return block

    def run(self, index: int, x_BTD: torch.Tensor) -> torch.Tensor:
        """Output (batch, tokens, hidden) of the loaded block."""
        return self._blocks[index](x_BTD, **self._arguments[index])

    def call(self, index: int, tensors: dict[str, torch.Tensor], x_BTD: torch.Tensor) -> torch.Tensor:
        """Output of a block that is not loaded, as a differentiable function of its weights and its input."""
        state = {name: tensor.to(self._dtype) for name, tensor in tensors.items()}
        return torch.func.functional_call(self._blocks[index], state, (x_BTD,), self._arguments[index])

    def release(self, index: int) -> None:
        """Give the block's memory back."""
        self._blocks[index].to("meta")


def batches(windows: torch.Tensor, tokens: int) -> Iterator[slice]:
    """Slices over windows (S, T) of about `tokens` tokens each."""
    rows = max(1, tokens // windows.shape[1])
    return (slice(start, min(start + rows, windows.shape[0])) for start in range(0, windows.shape[0], rows))
