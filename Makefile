# Everything a newcomer needs. `make demo` and `make test` set themselves up: nothing but Python, a C++ compiler and CMake before.

PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
PIP    := $(BIN)/python -m pip --disable-pip-version-check --quiet --quiet

# For a processor with AVX512-FP16, ggml would add attention's rows as halves, 128 numbers at a time and the rest one by one:
# twice the time for a model whose heads have 64. Built without, it takes AVX512's floats.
HALVES := $(shell echo | $(CC) -mno-avx512fp16 -E - >/dev/null 2>&1 && echo -mno-avx512fp16)
export CMAKE_ARGS ?= $(if $(HALVES),-DCMAKE_C_FLAGS=$(HALVES) -DCMAKE_CXX_FLAGS=$(HALVES))

.DEFAULT_GOAL := help
.PHONY: help demo demo-cluster test lint format docs screenshots clean

help:  ## this list
	@sed -n 's/^\([a-z-]*\):.*  ## /\1\t/p' $(MAKEFILE_LIST) | while IFS="$$(printf '\t')" read -r name text; do \
		printf '  make %-12s %s\n' "$$name" "$$text"; done

demo: $(VENV)/.demo  ## sixteen people on one small model, against one context each; then a server to talk to
	@$(BIN)/pasture demo

demo-cluster: $(VENV)/.demo,cluster  ## three replicas of one small model; the one that writes is killed, and another goes on
	@$(BIN)/pasture cluster demo

test: lint  ## lint, types and every test
	@$(BIN)/python -m pytest

lint: $(VENV)/.dev
	@$(BIN)/ruff check
	@$(BIN)/ruff format --check
	@$(BIN)/mypy

format: $(VENV)/.dev  ## put the code into shape
	@$(BIN)/ruff check --fix
	@$(BIN)/ruff format

docs: $(VENV)/.docs  ## the documentation as a site, in site/
	@NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict --quiet && echo "open site/index.html, or: python -m http.server -d site"

screenshots: $(VENV)/.dev  ## the documentation's pictures, made by the product itself
	@$(BIN)/python tools/screenshots.py

clean:  ## remove the environment and every cache
	rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache .hypothesis

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
		|| { echo 'pasture needs Python 3.11 or newer; try: make PYTHON=python3.12 ...' >&2; exit 1; }
	@$(PYTHON) -m venv $(VENV)
	@$(PIP) install --upgrade pip

# A stamp an extra: setting up again only when what is installed would change.
$(VENV)/.%: pyproject.toml constraints.txt | $(BIN)/python
	@echo 'Setting up $(VENV) for "$*". The first time, llama.cpp is compiled: a few minutes.'
	@$(PIP) install --constraint constraints.txt --editable '.[$*]'
	@touch $@
