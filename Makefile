# The front door. Every target makes the environment it needs and does nothing twice.

PYTHON ?= python3
# Empty: the default package index. For PyTorch's small CPU build, see README.md.
TORCH_INDEX ?=
PORT ?= 8000
# Processes that share the test suite; each takes up to a gigabyte.
WORKERS ?= 2
# Passed on to pytest, the demo, the chat or the benchmark.
ARGS ?=

VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DELETE_ON_ERROR:
.DEFAULT_GOAL := help

.PHONY: help
help:  ## show this list
	@sed -nE 's/^([a-z-]+):.*  ## (.*)/  make \1\t\2/p' $(MAKEFILE_LIST) | expand -t 22

.PHONY: demo
demo: $(VENV)/.demo  ## from real text to a served model; goes on where it was interrupted
	@$(BIN)/python demo.py --port $(PORT) $(ARGS)

.PHONY: chat
chat: $(VENV)/.demo  ## talk to the running server in the terminal
	@$(BIN)/astrai-chat --url http://127.0.0.1:$(PORT) $(ARGS)

.PHONY: test
test: $(VENV)/.dev  ## run the test suite
	@$(BIN)/python -m pytest -m "not slow" --numprocesses $(WORKERS) --dist loadfile $(ARGS)

.PHONY: check
check: $(VENV)/.dev  ## format, lint, types and the layers between packages
	@$(BIN)/ruff format --check .
	@$(BIN)/ruff check .
	@$(BIN)/pyright
	@$(BIN)/lint-imports

.PHONY: prove
prove: $(VENV)/.dev  ## the slow proofs: real kills, stress, load
	@$(BIN)/python -m pytest -m slow -s $(ARGS)

.PHONY: bench-serve
bench-serve: $(VENV)/.dev  ## measure the server on a random 53M model, beside its peers
	@$(BIN)/python benchmarks/serve.py $(ARGS)

.PHONY: clean
clean:  ## remove the environment and caches; trained models under runs/ stay
	@rm -rf $(VENV) build *.egg-info .pytest_cache .ruff_cache .import_linter_cache .hypothesis
	@find . -name __pycache__ -type d -prune -exec rm -rf {} +

# A stamp is touched when its installation is complete, so an interrupted one is done again.

$(VENV)/.python:
	@command -v "$(PYTHON)" >/dev/null || { echo >&2 "$(PYTHON) is not there: install Python 3.11" \
		"or newer, or name it: make PYTHON=/path/to/python3"; exit 1; }
	@"$(PYTHON)" -c 'import sys; v = sys.version_info; v >= (3, 11) or sys.exit("Python 3.11 or newer is \
	needed and $(PYTHON) is %d.%d; name another one: make PYTHON=python3.12" % v[:2])'
	@$(BIN)/python -m pip --version >/dev/null 2>&1 || "$(PYTHON)" -m venv --clear $(VENV)
	@touch $@

# First and alone: whatever depends on torch must find this version, of the index that was chosen.
$(VENV)/.torch: $(VENV)/.python constraints.txt
	@echo "Installing PyTorch"
	@$(PIP) install $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) $$(grep '^torch==' constraints.txt)
	@touch $@

$(VENV)/.demo $(VENV)/.dev: $(VENV)/.%: $(VENV)/.torch pyproject.toml constraints.txt
	@echo "Installing AstrAI and the packages of its extra \"$*\": about a minute"
	@$(PIP) install --quiet --constraint constraints.txt --editable '.[$*]'
	@touch $@
