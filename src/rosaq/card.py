"""The model card that a checkpoint carries: README.md in the hub's format, metadata block first."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData

from rosaq.source import Source

CHANNELS = "channels.png"  # the picture that the card shows, beside it


@dataclass(frozen=True)
class Pictures:
    """Pictures of a model card, by file name; saves itself as tokenizers do."""

    files: dict[str, bytes]

    def save_pretrained(self, folder: Path) -> None:
        """Write them into a folder."""
        for name, picture in self.files.items():
            (folder / name).write_bytes(picture)

    @classmethod
    def of(cls, checkpoint: Path) -> "Pictures":
        """Those that lie in a checkpoint."""
        return cls({name: (checkpoint / name).read_bytes() for name in (CHANNELS,) if (checkpoint / name).is_file()})


def model_card(source: Source, report: Any, pictures: Pictures) -> str:
    """Markdown with the recipe, the sizes, and how to load it; no times, so that the same run gives the same bytes.

    Args:
        source: the model that was quantized.
        report: the run's `run.Report`.
        pictures: that will lie beside it.
    """
    recipe, calibration = report.recipe, report.calibration
    size, original = report.checkpoint_bytes / 1e6, report.original_bytes / 1e6
    rows = "\n".join(f"| {key} | {value} |" for key, value in recipe.items() if key not in ("name", "description", "allocation"))
    body = f"""# {source.public_name.rpartition("/")[2]}, quantized by rosaq

{recipe["description"] or recipe["name"]} **{report.bits_per_weight:.2f} bits per weight** of the decoder's linear
layers, scales, zero points and salient channels included; {size:.1f} MB against {original:.1f} MB in FP16.

{_license(source)}

## Load it

```python
import rosaq  # registers the format with transformers
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("PATH")
tokenizer = AutoTokenizer.from_pretrained("PATH")
```
{_channels(report) if CHANNELS in pictures.files else ""}
## Recipe `{recipe["name"]}`

| setting | value |
| --- | --- |
{rows}

Calibrated on {calibration["samples"]} windows of {calibration["seq_len"]} tokens of `{Path(calibration["text"]).name}`
on {report.device} (seed {calibration.get("seed")}; SHA-256 of the token ids {calibration["windows_sha256"]}).
"""
    return str(ModelCard(f"---\n{metadata(source, recipe).to_yaml()}\n---\n\n{body}"))


def metadata(source: Source, recipe: dict[str, Any]) -> ModelCardData:
    """The card's metadata block: what the hub shows and searches."""
    origin = source.origin
    relation: dict[str, Any] = {} if origin.hub_id is None else {"base_model_relation": "quantized"}
    return ModelCardData(
        base_model=origin.hub_id,
        language=list(origin.languages) or None,
        library_name="transformers",
        license=origin.license,
        license_name=origin.license_name,
        license_link=origin.license_link,
        pipeline_tag="text-generation",
        tags=["rosaq", "quantized", *([] if recipe.get("allocation") else [f"{recipe['bits']}-bit"])],
        **relation,
    )


def _license(source: Source) -> str:
    if source.origin.license is None:
        return "The original states no license where rosaq reads one; what holds for it holds for this model too."
    return f"License: {source.origin.license_name or source.origin.license}, as the original states."


def _channels(report: Any) -> str:
    salient = 0 if report.recipe["allocation"] else report.recipe["salient"]
    shaded = f" The {salient} channels that stay precise are shaded." if salient else ""
    return f"""
## Channels before and after rotation

![Root mean square of each channel before and after rotation]({CHANNELS})

The residual stream over the calibration text, all sites together, over the mean channel.{shaded}
"""
