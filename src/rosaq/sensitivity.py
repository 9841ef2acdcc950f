"""How much the loss feels each token's errors at each site: the Fisher information of the linear layers' outputs, token by token.

For errors e_t of a layer's outputs at each token t, the divergence of the model's predictions is to second order
KL = 1/2 E (sum_t g_t . e_t)^2, with g_t the gradient of -log p(s) by the outputs and s drawn from the model's own predictions
(Amari). Taking the errors of tokens and outputs as independent, and those of all outputs of a site as alike, an error counts by
w_t = sum_n g_tn^2 over the outputs of the site's layers: KL = 1/2 E_t w_t e_t^2, e_t^2 the mean square of the error of an
output. So the moment sum_t w_t x_t^T x_t is to GPTQ what the loss feels (GuidedQuant, arXiv:2505.07004, with one group of
outputs). An attention sink, which all later tokens look at, has a large w. Shape letters: S windows, T tokens, D hidden, V
vocabulary.
"""

from contextlib import ExitStack

import torch

from rosaq.activations import Activations
from rosaq.architecture import LINEARS, SITES
from rosaq.clock import Progress
from rosaq.distributed import Ranks
from rosaq.learned import gpu_arithmetic
from rosaq.moments import BATCH_TOKENS, Flow, check_finite, embed, folded, own_windows
from rosaq.skeleton import BlockRunner, batches
from rosaq.source import Source

SEED = 0  # of the tokens that are drawn from the predictions
LOGITS_BYTES = 1 << 26  # of a float32 matrix of logits; about five are held at a time
SEGMENT = 8  # blocks whose inputs are held at a time; of all others the inputs of every eighth are


class _Squares:
    """Squared length of the gradient by the outputs of a site's layers, of each token, batch after batch."""

    def __init__(self, block: torch.nn.Module, site: str, tokens: int) -> None:
        self.parts = [torch.zeros(0, tokens, device=next(block.parameters()).device)]  # a rank may have no window
        self.handles = [block.get_submodule(LINEARS[role]).register_forward_hook(self._seen) for role in SITES[site]]

    def begin(self, x_STD: torch.Tensor) -> None:
        """A new batch of inputs of the block."""
        self.parts.append(torch.zeros(x_STD.shape[:2], device=x_STD.device))

    def _seen(self, _: torch.nn.Module, __: tuple[torch.Tensor, ...], y: torch.Tensor) -> None:
        y.register_hook(self._felt)

    def _felt(self, gradient: torch.Tensor) -> None:
        self.parts[-1] += gradient.float().square().sum(-1)

    def finish(self, where: str) -> torch.Tensor:
        """The squares (S, T) on the host."""
        for handle in self.handles:
            handle.remove()
        found = torch.cat(self.parts)
        check_finite(found, where)
        return found.cpu()


class _Passes:
    """Decoder blocks run over windows, forward and backward, in an order that is known beforehand, so that they are read ahead."""

    def __init__(self, source: Source, windows: torch.Tensor, device: str, dtype: torch.dtype) -> None:
        self.runner, self.dtype = BlockRunner(source.config, windows.shape[1], dtype, device), dtype
        self.tokens = windows.shape[1]
        self.rows = list(batches(windows, BATCH_TOKENS[torch.device(device).type]))
        starts = range(0, source.architecture.layers, SEGMENT)
        self.segments = [range(start, min(start + SEGMENT, source.architecture.layers)) for start in starts]
        again = [index for segment in reversed(self.segments) for index in (*segment[:-1], *reversed(segment))]
        self.blocks = source.blocks([*range(source.architecture.layers), *again], device)

    @torch.no_grad()
    def forward(self, index: int, inputs: Activations, outputs: Activations, copy: Activations | None = None) -> None:
        """Run the next block, which is this one; its inputs may be copied, and overwritten."""
        self.runner.load(index, folded(next(self.blocks), self.dtype))
        for rows in self.rows:
            x_STD = inputs.read(rows)
            if copy is not None:
                copy.write(rows, x_STD)
            outputs.write(rows, self.runner.run(index, x_STD))
        self.runner.release(index)

    def backward(self, index: int, inputs: Activations, gradients: Activations) -> dict[str, torch.Tensor]:
        """Put the gradient by the next block's inputs in place of that by its outputs; the squares at its sites."""
        block = self.runner.load(index, folded(next(self.blocks), self.dtype)).requires_grad_(False)
        squares = {site: _Squares(block, site, self.tokens) for site in SITES}
        for rows in self.rows:
            x_STD = inputs.read(rows).requires_grad_()
            for kept in squares.values():
                kept.begin(x_STD)
            with torch.enable_grad():
                y_STD = self.runner.run(index, x_STD)
            (gradient,) = torch.autograd.grad(y_STD, x_STD, gradients.read(rows))
            gradients.write(rows, gradient)
        self.runner.release(index)
        return {site: kept.finish(f"decoder block {index}, gradients") for site, kept in squares.items()}


def held_states(layers: int) -> int:
    """How many times S x T x D `token_weights` holds: inputs of every eighth block, of eight blocks, and a gradient."""
    return -(-layers // SEGMENT) + min(SEGMENT, layers)


def token_weights(
    source: Source, windows: torch.Tensor, device: str, dtype: torch.dtype, flow: Flow, progress: Progress
) -> list[dict[str, torch.Tensor]]:
    """What an error counts at each token of the windows (S, T), float32 on the host, in nats; of each block, by site.

    One block is on the device; `held_states` times the hidden states of this rank's windows are kept where the flow says.

    Args:
        source: the model.
        windows: token ids (S, T), of all ranks.
        device: where the blocks run.
        dtype: type they run in.
        flow: ranks, and where activations are kept.
        progress: called as ("sensitivity", done, blocks).

    Raises:
        ValueError: the gradients are not finite.
    """
    layers, whole = source.architecture.layers, windows.shape
    tokens = BATCH_TOKENS[torch.device(device).type]
    mine = own_windows(windows, tokens, flow.ranks)
    windows = windows[mine]
    passes, shape = _Passes(source, windows, device, dtype), (windows.shape[0], windows.shape[1], source.architecture.hidden)
    with ExitStack() as stack, gpu_arithmetic(device):
        held = [stack.enter_context(Activations(shape, dtype, device, flow.place, flow.folder)) for _ in range(held_states(layers))]
        kept, inputs, states = held[: len(passes.segments)], held[len(passes.segments) : -1], held[-1]
        embed(source, windows, states, (device, dtype), tokens)
        for number, segment in enumerate(passes.segments):
            for index in segment:
                passes.forward(index, states, states, kept[number] if index == segment.start else None)
        _start(source, windows, states, device, mine.start)
        found: list[dict[str, torch.Tensor]] = []
        for number, segment in reversed(list(enumerate(passes.segments))):
            inputs_of = [kept[number], *inputs]
            for index in segment[:-1]:
                passes.forward(index, inputs_of[index - segment.start], inputs_of[index + 1 - segment.start])
            for index in reversed(segment):
                squares = passes.backward(index, inputs_of[index - segment.start], states)
                found.insert(0, {site: _of_all(own, mine, whole, flow.ranks) for site, own in squares.items()})
                progress("sensitivity", len(found), layers)
    return found


def _of_all(own: torch.Tensor, mine: slice, whole: torch.Size, ranks: Ranks) -> torch.Tensor:
    """The squares (S, T) of all ranks' windows out of each one's own."""
    found = torch.zeros(whole)
    found[mine] = own
    return ranks.add(found)


def _start(source: Source, windows: torch.Tensor, states: Activations, device: str, first: int) -> None:
    """Put the gradient of -log p(s) in place of the last hidden states, window by window; `first` is the number of the first one."""
    generator = torch.Generator(device)
    head_VD = (source.head().float() * source.final_norm().float()).to(device)
    epsilon = float(source.config.rms_norm_eps)
    for number in range(windows.shape[0]):
        rows, parts = slice(number, number + 1), []
        generator.manual_seed(SEED + first + number)  # the same tokens whichever rank draws them
        for read_TD in states.read(rows)[0].split(max(1, LOGITS_BYTES // (4 * len(head_VD)))):
            x_TD = read_TD.float().requires_grad_()
            with torch.enable_grad():
                logits_TV = torch.nn.functional.rms_norm(x_TD, x_TD.shape[-1:], eps=epsilon) @ head_VD.T
                drawn_T = torch.multinomial(logits_TV.detach().softmax(-1), 1, generator=generator)[:, 0]
                loss = torch.nn.functional.cross_entropy(logits_TV, drawn_T, reduction="sum")
            parts.append(torch.autograd.grad(loss, x_TD)[0].to(read_TD.dtype))
        states.write(rows, torch.cat(parts)[None])
