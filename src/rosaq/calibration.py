"""Calibration text to token windows: seeded, and with a hash of what was read.

Documents are shuffled by the seed, tokenized as the tokenizer does by default (with its BOS, if it adds one), joined
in that order and cut into windows of equal length.
"""

import hashlib
import random
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from rosaq.clock import Progress
from rosaq.text_files import read_entries, read_text

# Hub data sets, streamed: (path, configuration, split, field). The paper calibrates on the Pile.
HUB_TEXTS = {
    "pile": ("mit-han-lab/pile-val-backup", None, "validation", "text"),
    "c4": ("allenai/c4", "en", "validation", "text"),
    "wikitext2": ("Salesforce/wikitext", "wikitext-2-raw-v1", "train", "text"),
}


@dataclass(frozen=True)
class Calibration:
    """Which text calibrates, and how much of it.

    Attributes:
        text: "pile", "c4", "wikitext2" (hub data sets), "self" (sampled from the model), or a .txt, .json or .jsonl
            file (one object with a field "text" a line).
        samples: number of windows.
        seq_len: tokens per window.
        seed: of the shuffle, and of the sampling of "self".
    """

    text: str = "pile"
    samples: int = 128
    seq_len: int = 2048
    seed: int = 0

    def __post_init__(self) -> None:
        """Refuse sizes that give no window."""
        for name in ("samples", "seq_len"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be 1 or more")

    def to_dict(self) -> dict[str, Any]:
        """All fields, JSON-able."""
        return asdict(self)


def read_documents(text: str) -> Iterable[str]:
    """The documents of a calibration text that is a file or a hub data set.

    Raises:
        ValueError: no such file or data set, a line that is not an object with a text, or no text at all.
    """
    if text in HUB_TEXTS:
        return _hub_documents(text)
    path = Path(text).expanduser()
    if not path.is_file():
        raise ValueError(f"calibration {text!r}: no such file, and not one of {', '.join(HUB_TEXTS)}, self")
    documents = [_entry_text(*entry) for entry in read_entries(path)] if path.suffix in (".json", ".jsonl") else [read_text(path)]
    documents = [document for document in documents if document.strip()]
    if not documents:
        raise ValueError(f"calibration {path}: holds no text")
    return documents


def _entry_text(place: str, entry: Any) -> str:
    text = entry.get("text") if isinstance(entry, dict) else entry
    if not isinstance(text, str):
        raise ValueError(f"calibration {place}: no field 'text' with a string")
    return text


def _hub_documents(text: str) -> Iterable[str]:
    try:
        import datasets  # noqa: PLC0415  (an optional dependency)
    except ImportError as error:
        raise ValueError(f"calibration {text!r} needs the package datasets: pip install 'rosaq[eval]', or give a text file") from error
    path, configuration, split, field = HUB_TEXTS[text]
    try:
        rows = datasets.load_dataset(path, configuration, split=split, streaming=True)
        return [row[field] for _, row in zip(range(5000), rows, strict=False) if row[field].strip()]
    except Exception as error:
        raise ValueError(f"calibration {text!r}: the hub did not give {path}: {str(error).splitlines()[0]}; give a text file or 'self'") from error


def token_windows(documents: Iterable[str], tokenizer: Any, calibration: Calibration) -> torch.Tensor:
    """Windows (samples, seq_len) of token ids.

    Raises:
        ValueError: the text is too short for the windows; says how many tokens there are and are needed.
    """
    shuffled = list(documents)
    random.Random(calibration.seed).shuffle(shuffled)
    wanted, ids = calibration.samples * calibration.seq_len, []
    for document in shuffled:
        ids.extend(tokenizer(document, verbose=False).input_ids)
        if len(ids) >= wanted:
            break
    if len(ids) < wanted:
        raise ValueError(
            f"calibration {calibration.text!r}: {len(ids)} tokens of text, but {calibration.samples} windows of "
            f"{calibration.seq_len} need {wanted}; give more text, fewer samples or a shorter seq-len"
        )
    return torch.tensor(ids[:wanted]).view(calibration.samples, calibration.seq_len)


@torch.inference_mode()
def sample_windows(model: Any, calibration: Calibration, progress: Progress, batch: int = 64) -> torch.Tensor:
    """Windows (samples, seq_len) sampled from the model itself, for calibration without any text.

    Each window begins with a token drawn uniformly from the vocabulary; the rest is sampled at temperature 1, as in
    the data-free calibration of LLM-QAT (arXiv:2305.17888, section 2.1), but without its greedy first tokens.
    """
    generator = torch.Generator(device=model.device).manual_seed(calibration.seed)
    vocabulary = model.config.vocab_size
    windows = []
    for start in range(0, calibration.samples, batch):
        rows = min(batch, calibration.samples - start)
        ids = torch.randint(vocabulary, (rows, 1), generator=generator, device=model.device)
        cache, out = None, [ids]
        for token in range(1, calibration.seq_len):
            output = model(out[-1], past_key_values=cache, use_cache=True)
            cache = output.past_key_values
            chances = torch.softmax(output.logits[:, -1].float(), -1)
            out.append(torch.multinomial(chances, 1, generator=generator))
            progress("sampling", start * calibration.seq_len + rows * (token + 1), calibration.samples * calibration.seq_len)
        windows.append(torch.cat(out, 1))
    return torch.cat(windows).cpu()


def windows_hash(windows: torch.Tensor) -> str:
    """SHA-256 of the token ids, as int64 little-endian: what a checkpoint says it was calibrated on."""
    return hashlib.sha256(windows.to(torch.int64).contiguous().numpy().astype("<i8").tobytes()).hexdigest()
