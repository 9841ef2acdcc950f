"""Tests marked `vllm` are skipped where vLLM is not installed."""

import importlib.util

import pytest


def has_vllm():
    try:  # a module inside it: without vLLM, this very folder may be found under its name
        return importlib.util.find_spec("vllm.model_executor") is not None
    except ModuleNotFoundError:
        return False


def pytest_runtest_setup(item):
    if item.get_closest_marker("vllm") and not has_vllm():
        pytest.skip("vLLM is not installed")
