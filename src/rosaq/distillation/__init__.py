"""Distillation: what a packed checkpoint keeps precise (group scales, salient weights, norms) trained against its original."""

from rosaq.distillation.run import Report, distill
from rosaq.distillation.training import Settings

__all__ = ["Report", "Settings", "distill"]
