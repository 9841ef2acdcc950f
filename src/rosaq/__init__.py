"""rosaq: rotation-based saliency-aware weight quantization of language models (ROSAQ, arXiv:2506.13472).

Importing it registers the checkpoint format with transformers, which has no other way to learn of it.
"""

from rosaq.calibration import Calibration
from rosaq.engines.transformers import register as _register
from rosaq.pipeline import quantize
from rosaq.recipe import Recipe, load_recipe, shipped_recipes
from rosaq.run import Means, Report
from rosaq.source import Source, open_source
from rosaq.statistics import Statistics, measure
from rosaq.version import __version__

_register()

__all__ = [
    "Calibration",
    "Means",
    "Recipe",
    "Report",
    "Source",
    "Statistics",
    "__version__",
    "load_recipe",
    "measure",
    "open_source",
    "quantize",
    "shipped_recipes",
]
