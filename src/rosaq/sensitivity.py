"""How much the loss feels the outputs of each linear layer: the Fisher information of the outputs, block by block.

For an error e_t of a layer's outputs y_t at each token t, the divergence of the model's predictions is to second order
KL = 1/2 E (sum_t g_t . e_t)^2, with g_t the gradient of -log p(s) by y_t and s drawn from the model's own predictions
(Amari; as a measure for quantization e.g. GuidedQuant, arXiv:2505.07004). Taking the errors of tokens and outputs as
independent, and each output's error as the same share of its variance, leaves one number a layer: sum_n E g_n^2 E y_n^2 / 2.
Shape letters: S windows, T tokens, D hidden, V vocabulary, N outputs of a layer.
"""

from contextlib import ExitStack

import torch

from rosaq.activations import Activations
from rosaq.architecture import LINEARS
from rosaq.clock import Progress
from rosaq.learned import gpu_arithmetic
from rosaq.moments import BATCH_TOKENS, Flow, check_finite, folded
from rosaq.skeleton import BlockRunner, batches
from rosaq.source import Source

SEED = 0  # of the tokens that are drawn from the predictions
WRITERS = ("o", "down")  # roles whose outputs are added to the residual stream


class _Squares:
    """Sums over tokens of the squares of a layer's outputs (N,) and of the gradient by them."""

    def __init__(self, linear: torch.nn.Linear, basis_NN: torch.Tensor | None) -> None:
        self.basis_NN, self.bias = basis_NN, linear.bias
        self.outputs = self.gradients = torch.zeros(linear.out_features, dtype=torch.float64, device=linear.weight.device)
        self.handle = linear.register_forward_hook(self._seen)

    def _seen(self, _: torch.nn.Module, __: tuple[torch.Tensor, ...], y: torch.Tensor) -> None:
        self.outputs = self.outputs + self._squared(y.detach() if self.bias is None else y.detach() - self.bias)
        y.register_hook(self._felt)

    def _felt(self, gradient: torch.Tensor) -> None:
        self.gradients = self.gradients + self._squared(gradient)

    def _squared(self, values: torch.Tensor) -> torch.Tensor:
        values = values.flatten(0, -2).float()
        if self.basis_NN is not None:
            values = values @ self.basis_NN.to(values)
        return values.square().sum(0, dtype=torch.float64)


def output_sensitivity(
    source: Source, windows: torch.Tensor, device: str, dtype: torch.dtype, basis_DD: torch.Tensor | None, flow: Flow, progress: Progress
) -> list[dict[str, float]]:
    """Expected divergence, in nats per token, if all outputs of a layer were off by as much as they vary; of each block, by role.

    One block and the inputs of all blocks, S x T x D each, are held; the latter on the host, or on disk.

    Args:
        source: the model.
        windows: token ids (S, T).
        device: where the blocks run.
        dtype: type they run in.
        basis_DD: of the residual stream, where it is rotated: the outputs of o and down are looked at in it.
        flow: where activations are kept, and the clock.
        progress: called as ("sensitivity", done, blocks).

    Raises:
        ValueError: the gradients are not finite.
    """
    a, tokens = source.architecture, BATCH_TOKENS[torch.device(device).type]
    runner, place = BlockRunner(source.config, windows.shape[1], dtype, device), "disk" if flow.place == "disk" else "host"
    shape = (windows.shape[0], windows.shape[1], a.hidden)
    with ExitStack() as stack, gpu_arithmetic(device):
        states = [stack.enter_context(Activations(shape, dtype, device, place, flow.folder)) for _ in range(a.layers + 1)]
        table = source.embedding()
        for rows in batches(windows, tokens):
            states[0].write(rows, torch.nn.functional.embedding(windows[rows], table).to(dtype))
        with torch.no_grad():
            for index, block in enumerate(source.blocks(range(a.layers), device)):
                runner.load(index, folded(block, dtype))
                for rows in batches(windows, tokens):
                    states[index + 1].write(rows, runner.run(index, states[index].read(rows)))
                runner.release(index)
        gradients = states[-1]
        _start(source, windows, gradients, device)
        found: list[dict[str, float]] = []
        order = range(a.layers - 1, -1, -1)
        for index, tensors in zip(order, source.blocks(order, device), strict=True):
            loaded = runner.load(index, folded(tensors, dtype)).requires_grad_(False)
            layers = {role: loaded.get_submodule(module) for role, module in LINEARS.items()}
            sums = {role: _Squares(layer, basis_DD if role in WRITERS else None) for role, layer in layers.items()}  # type: ignore[arg-type]
            for rows in batches(windows, tokens):
                x_STD = states[index].read(rows).requires_grad_()
                with torch.enable_grad():
                    y_STD = runner.run(index, x_STD)
                (gradient,) = torch.autograd.grad(y_STD, x_STD, gradients.read(rows))
                gradients.write(rows, gradient)
            for kept in sums.values():
                kept.handle.remove()
                check_finite(kept.gradients, f"decoder block {index}, gradients")
            runner.release(index)
            count = windows.numel()
            found.insert(0, {role: float((kept.gradients / count) @ (kept.outputs / count)) / 2 for role, kept in sums.items()})
            progress("sensitivity", a.layers - index, a.layers)
    return found


def _start(source: Source, windows: torch.Tensor, states: Activations, device: str) -> None:
    """Put the gradient of -log p(s) in place of the last hidden states, window by window."""
    generator = torch.Generator(device).manual_seed(SEED)
    head_VD = (source.head().float() * source.final_norm().float()).to(device)
    epsilon = float(source.config.rms_norm_eps)
    for number in range(windows.shape[0]):
        rows = slice(number, number + 1)
        read = states.read(rows)
        x_TD = read[0].float().requires_grad_()
        with torch.enable_grad():
            logits_TV = torch.nn.functional.rms_norm(x_TD, x_TD.shape[-1:], eps=epsilon) @ head_VD.T
            drawn_T = torch.multinomial(logits_TV.detach().softmax(-1), 1, generator=generator)[:, 0]
            loss = torch.nn.functional.cross_entropy(logits_TV, drawn_T, reduction="sum")
        (gradient,) = torch.autograd.grad(loss, x_TD)
        states.write(rows, gradient[None].to(read.dtype))
