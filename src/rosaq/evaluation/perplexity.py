"""Perplexity over fixed windows, and how far a quantized model's predictions lie from its original's.

The protocol is the one that GPTQ (arXiv:2210.17323) and AWQ report: the whole text is tokenized at once, cut into
windows of 2048 tokens that do not overlap, a last incomplete window is dropped; each window is predicted from its own
tokens only, 2047 predictions a window; perplexity is exp of the mean negative log-likelihood over all of them. The
WikiText-2 text is its lines, blank ones empty, joined by two newlines.
"""

import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from rosaq.clock import Progress
from rosaq.text_files import read_text

WINDOW = 2048
LOGITS_BYTES = 2 * 10**9
WIKITEXT2 = ("Salesforce/wikitext", "wikitext-2-raw-v1", "test")
WIKITEXT2_FILE = "wiki.test.raw"


@dataclass(frozen=True)
class Perplexity:
    """Result over S windows of T tokens.

    Attributes:
        perplexity: exp(mean negative log-likelihood per predicted token).
        standard_error: of the perplexity, from the spread of the windows' means.
        windows: S.
        window_tokens: T.
    """

    perplexity: float
    standard_error: float
    windows: int
    window_tokens: int

    def to_dict(self) -> dict[str, Any]:
        """All fields, JSON-able."""
        return asdict(self)


@dataclass(frozen=True)
class Divergence:
    """A model beside its reference on the same windows.

    Attributes:
        model: the model's perplexity.
        reference: the reference's perplexity.
        kl_divergence: mean over predicted tokens of KL(reference || model), in nats.
        top1_agreement: share of tokens where both find the same token likeliest.
    """

    model: Perplexity
    reference: Perplexity
    kl_divergence: float
    top1_agreement: float

    def to_dict(self) -> dict[str, Any]:
        """All fields, JSON-able."""
        return asdict(self)


def text_windows(text: str, tokenizer: Any, window: int = WINDOW) -> torch.Tensor:
    """All whole windows (S, T) of a text's tokens.

    Raises:
        ValueError: the text has less than one window of tokens.
    """
    ids = tokenizer(text, verbose=False).input_ids
    count = len(ids) // window
    if not count:
        raise ValueError(f"the text has {len(ids)} tokens, less than one window of {window}; give more text or a shorter --window")
    return torch.tensor(ids[: count * window]).view(count, window)


def join_wikitext(lines: list[str]) -> str:
    """WikiText-2 as GPTQ joins it: each line with its newline, blank lines empty, two newlines between."""
    return "\n\n".join(line if line.strip() else "" for line in lines)


def read_wikitext2(folder: Path | None = None) -> str:
    """The WikiText-2 test text, from the hub or from `wiki.test.raw` in a folder.

    Raises:
        ValueError: the folder has no such file, or the hub cannot be reached.
    """
    if folder is not None:
        file = folder / WIKITEXT2_FILE
        if not file.is_file():
            raise ValueError(f"{file}: no such file; --data is a folder that holds {WIKITEXT2_FILE}")
        return join_wikitext(read_text(file).splitlines(keepends=True))
    try:
        import datasets  # noqa: PLC0415  (an optional dependency)

        return join_wikitext(datasets.load_dataset(*WIKITEXT2[:2], split=WIKITEXT2[2])["text"])
    except ImportError as error:
        raise ValueError("the data set wikitext2 needs the package datasets: pip install 'rosaq[eval]', or give --data or --text") from error
    except Exception as error:
        raise ValueError(f"the hub did not give {WIKITEXT2[0]}: {str(error).splitlines()[0]}; give --data DIR or --text FILE") from error


@torch.inference_mode()
def perplexity(model: Any, windows: torch.Tensor, progress: Progress) -> Perplexity:
    """Perplexity of a causal language model over windows (S, T).

    Raises:
        ValueError: windows longer than the model's context.
    """
    losses: list[float] = []
    for rows in _batches(model, windows):
        losses += _losses(_logits(model, rows), rows.to(model.device))
        progress("perplexity", len(losses), len(windows))
    return _result(losses, windows)


@torch.inference_mode()
def divergence(model: Any, reference: Any, windows: torch.Tensor, progress: Progress) -> Divergence:
    """Perplexities of both, KL divergence and top-1 agreement over windows (S, T), in one pass.

    Raises:
        ValueError: windows longer than a model's context, or vocabularies of different sizes.
    """
    tokens = [each.config.vocab_size for each in (model, reference)]
    if tokens[0] != tokens[1]:
        raise ValueError(f"the model has {tokens[0]} tokens and the one that it is compared with {tokens[1]}; give its original")
    check_context(reference, windows)
    losses: list[float] = []
    reference_losses: list[float] = []
    kl, same = 0.0, 0
    for rows in _batches(model, windows):
        logits, wanted = _logits(model, rows), _logits(reference, rows).to(model.device)
        losses += _losses(logits, rows.to(model.device))
        reference_losses += _losses(wanted, rows.to(model.device))
        for logits_TV, wanted_TV in zip(logits[:, :-1], wanted[:, :-1], strict=True):
            kl += _kl(wanted_TV, logits_TV)
            same += int((logits_TV.argmax(-1) == wanted_TV.argmax(-1)).sum())
        progress("divergence", len(losses), len(windows))
    predicted = windows.shape[0] * (windows.shape[1] - 1)
    return Divergence(_result(losses, windows), _result(reference_losses, windows), kl / predicted, same / predicted)


def check_context(model: Any, windows: torch.Tensor) -> None:
    """Refuse windows (S, T) longer than a model's context, whose losses would say nothing of the model.

    Raises:
        ValueError: names both lengths.
    """
    context = model.config.max_position_embeddings
    if windows.shape[1] > context:
        raise ValueError(f"a window has {windows.shape[1]} tokens, but the model has a context of {context}; give a shorter --window")


def _batches(model: Any, windows: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Windows in batches whose float32 logits take at most LOGITS_BYTES; one at a time on the CPU."""
    check_context(model, windows)
    if model.device.type == "cpu":
        return windows.split(1)
    return windows.split(max(1, LOGITS_BYTES // (4 * windows.shape[1] * model.config.vocab_size)))


def _logits(model: Any, rows: torch.Tensor) -> torch.Tensor:
    logits = model(rows.to(model.device), use_cache=False).logits
    if not torch.isfinite(logits).all():
        raise ValueError("the model's logits hold NaN or Inf; try --dtype float32")
    return logits.float()


def _losses(logits_STV: torch.Tensor, rows_ST: torch.Tensor) -> list[float]:
    return [float(torch.nn.functional.cross_entropy(logits[:-1], row[1:])) for logits, row in zip(logits_STV, rows_ST, strict=True)]


def _kl(wanted_TV: torch.Tensor, logits_TV: torch.Tensor) -> float:
    total = 0.0
    for wanted, logits in zip(wanted_TV.split(1024), logits_TV.split(1024), strict=True):  # a vocabulary is wide
        log_p, log_q = wanted.log_softmax(-1), logits.log_softmax(-1)
        total += float((log_p.exp() * (log_p - log_q)).sum())
    return total


def _result(losses: list[float], windows: torch.Tensor) -> Perplexity:
    values = torch.tensor(losses, dtype=torch.float64)
    mean = math.exp(float(values.mean()))
    spread = float(values.std()) / math.sqrt(len(losses)) * mean if len(losses) > 1 else math.nan
    return Perplexity(mean, spread, windows.shape[0], windows.shape[1])
