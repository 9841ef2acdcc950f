"""The model card that a checkpoint carries: README.md in the hub's format, metadata block first."""

from typing import Any

from rosaq.source import Source


def model_card(source: Source, report: Any) -> str:
    """Markdown with the recipe, the sizes, and how to load it; no times, so that the same run gives the same bytes.

    Args:
        source: the model that was quantized.
        report: the run's `pipeline.Report`.
    """
    recipe, calibration = report.recipe, report.calibration
    size, original = report.checkpoint_bytes / 1e6, report.original_bytes / 1e6
    on_hub = source.name.count("/") == 1 and not source.name.startswith((".", "/"))
    base = f"base_model: {source.name}\nbase_model_relation: quantized\n" if on_hub else ""
    rows = "\n".join(f"| {key} | {value} |" for key, value in recipe.items() if key not in ("name", "description"))
    return f"""---
library_name: transformers
tags:
- rosaq
- quantized
{base}---

# {source.name.rstrip("/").rsplit("/", 1)[-1]}, quantized by rosaq

{recipe["description"] or recipe["name"]} **{report.bits_per_weight:.2f} bits per weight** of the decoder's linear
layers, scales, zero points and salient channels included; {size:.1f} MB against {original:.1f} MB in FP16.

## Load it

```python
import rosaq  # registers the format with transformers
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("PATH")
tokenizer = AutoTokenizer.from_pretrained("PATH")
```

## Recipe `{recipe["name"]}`

| setting | value |
| --- | --- |
{rows}

Calibrated on {calibration["samples"]} windows of {calibration["seq_len"]} tokens of `{calibration["text"]}`
on {report.device} (seed {calibration.get("seed")}; SHA-256 of the token ids {calibration["windows_sha256"]}).
"""
