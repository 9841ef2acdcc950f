"""What the report says in words: one sentence of size, bits, loss and speed."""

from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

from rosaq.comparison.table import BITS_COLUMN, PERPLEXITY_COLUMN, Row, Table, make_table
from rosaq.distillation.run import RECORD as DISTILLED
from rosaq.report.reading import Evidence, Found

MEGABYTE = 1e6


@dataclass(frozen=True)
class Quantized:
    """A quantized model that a checkpoint or a run's report tells of.

    Attributes:
        name: of the folder or file.
        report: what the run recorded.
        distilled: what distillation recorded, empty where there was none.
    """

    name: str
    report: dict[str, Any]
    distilled: dict[str, Any] = field(default_factory=dict)

    @property
    def smaller(self) -> float:
        """How many times smaller it is than in FP16."""
        return float(self.report["original_bytes"] / self.report["checkpoint_bytes"])


def quantized(evidence: Evidence) -> list[Quantized]:
    """The models that were quantized, a checkpoint and the report of the run that made it taken for one."""
    found = [Quantized(one.name, one.data["report"], one.data.get(DISTILLED, {})) for one in evidence.of("checkpoint") if "report" in one.data]
    for one in evidence.of("run"):
        if not any(all(one.data.get(key) == model.report[key] for key in ("recipe", "calibration", "checkpoint_bytes")) for model in found):
            found.append(Quantized(one.name, one.data))
    return found


def title_of(evidence: Evidence) -> str:
    """What the report is about: the model, where anything names it."""
    names = [model.report["model"] for model in quantized(evidence) if model.report.get("model")]
    names += [one.data["model"] for kind in ("comparison", "inspection", "evaluation", "decoding") for one in evidence.of(kind)]
    return f"{short_name(names[0])} in rosaq" if names else "rosaq"


def short_name(model: str) -> str:
    """The last part of a hub id, folder or file, without a file's ending."""
    name = Path(model.rstrip("/")).name
    return name.removesuffix(".gguf")


def sentences(evidence: Evidence) -> list[str]:
    """The summary: size and bits, then loss, then speed, as far as each was measured."""
    return [part for part in (_size(evidence), _loss(evidence), _speed(evidence)) if part]


def _size(evidence: Evidence) -> str:
    models = quantized(evidence)
    if not models:
        return ""
    report = models[0].report
    name = short_name(report["model"]) if report.get("model") else models[0].name
    sizes = f"{report['checkpoint_bytes'] / MEGABYTE:.1f} MB against {report['original_bytes'] / MEGABYTE:.1f} MB in FP16"
    return (
        f"{name}, quantized by {report['recipe']['name']}: {report['bits_per_weight']:.2f} bits per weight, {sizes} "
        f"({models[0].smaller:.2f} times smaller)."
    )


def _loss(evidence: Evidence) -> str:
    for one in evidence.of("evaluation"):
        for text, figures in one.data["texts"].items():
            if "reference" in figures:
                ours, reference = figures["model"]["perplexity"], figures["reference"]["perplexity"]
                windows = f"{figures['model']['windows']} windows of {Path(text).name}"
                return f"Perplexity {_against(ours, reference)}, KL divergence {figures['kl_divergence']:.3f} nats, on {windows}."
    tables = comparison_tables(evidence)
    return _best(tables[0][1]) if tables else ""


def _against(ours: float, original: float) -> str:
    return f"{ours:.2f} against the original's {original:.2f} ({100 * (ours / original - 1):+.1f} %)"


def _best(table: Table) -> str:
    """The lowest perplexity at each number of bits."""
    measured = [row for row in table.rows if not row.published and PERPLEXITY_COLUMN in row.figures]
    original = next((row for row in measured if row.bits == 16), None)
    parts = []
    for bits in sorted({row.bits for row in measured if row.bits != 16}, reverse=True):
        first = min((row for row in measured if row.bits == bits), key=_perplexity)
        against = f" ({100 * (_perplexity(first) / _perplexity(original) - 1):+.1f} %)" if original else ""
        bits_per_weight = first.figures[BITS_COLUMN].value
        parts.append(f"at {first.section} {first.method}'s, {_perplexity(first):.2f}{against} with {bits_per_weight:.2f} bits per weight")
    if not parts:
        return ""
    start = (
        f"The original's perplexity on WikiText-2 is {_perplexity(original):.2f}. The lowest is"
        if original
        else "The lowest WikiText-2 perplexity is"
    )
    return f"{start} {'; '.join(parts)}."


def _perplexity(row: Row) -> float:
    return row.figures[PERPLEXITY_COLUMN].value


def _speed(evidence: Evidence) -> str:
    for one in evidence.of("decoding"):
        rows = [row for row in one.data["rows"] if row["weights"] == "rosaq" and row["to_fp16"] is not None]
        if rows:
            row = min(rows, key=lambda row: (row["batch"], row["tokens"]))
            best = max(rows, key=lambda row: row["to_fp16"])
            more = f", at most {best['to_fp16']:.2f} times at batch {best['batch']}" if best["to_fp16"] >= 1.02 * row["to_fp16"] else ""
            return f"It decodes {row['to_fp16']:.2f} times as fast as FP16 in {row['engine']} at batch {row['batch']}{more}."
    for one in evidence.of("kernels"):
        ratios = [1 / row["to_best_peer"] for row in one.data["rows"] if row["to_best_peer"]]
        shares = [row["share_of_limit"] for row in one.data["rows"]]
        peers = f"{median(ratios):.2f} times as fast as the fastest peer and reaches " if ratios else ""
        return f"The kernel {'is ' + peers if peers else 'reaches '}{100 * median(shares):.0f} % of the limit (medians over {len(shares)} cases)."
    return ""


def comparison_tables(evidence: Evidence) -> list[tuple[Found, Table]]:
    """Every comparison in the layout of the paper's Table 5."""
    return [(one, make_table(f"{one.data['model']}: {one.name}", list(one.cells), one.published)) for one in evidence.of("comparison")]
