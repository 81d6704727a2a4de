# `make demo` and `make test` need only Debian's make and Python 3.11; they make .venv themselves.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed-$(shell cat requirements/cpu.txt requirements/vllm-cpu-shim/pyproject.toml pyproject.toml | sha256sum | cut -c1-16)
export HF_HUB_OFFLINE ?= 1
export VLLM_LOGGING_LEVEL ?= WARNING

.PHONY: demo test lint setup clean
setup: $(STAMP)

$(STAMP):
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --no-deps -r requirements/cpu.txt
	$(BIN)/python -m pip install --quiet --no-deps --no-build-isolation ./requirements/vllm-cpu-shim
	$(BIN)/python -m pip install --quiet --no-deps --no-build-isolation --editable .
	rm -f $(VENV)/.installed-*
	touch $@

demo: $(STAMP)
	$(BIN)/python examples/demo.py

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-logo

test: lint
	$(BIN)/python -m pytest -q --tb=short

clean:
	rm -rf $(VENV) demo-out
