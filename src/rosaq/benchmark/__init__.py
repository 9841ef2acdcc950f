"""Measurements against peers in the same run: kernels, and decoding of whole models."""
