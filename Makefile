# make train: the main job on the embedded default.  make evidence: its proof (PRESET=full for all of it).  make test: the tests (make unit: without whole runs).  make lint: style, types, import layers.
# Needs python3 (3.11 or newer, with venv and pip) and make; everything else goes into .venv.
PYTHON ?= python3
BIN := .venv/bin
PRESET ?= quick
INSTALLED := .venv/.installed
# Workers import torch, so more of them than files of tests only cost start-up time.
PYTEST_ARGS ?= -n auto --maxprocesses 8 --dist worksteal

.PHONY: install train evidence test unit lint clean
.DELETE_ON_ERROR:

train: $(INSTALLED)
	$(BIN)/pte compare configs/embedded.toml $(if $(wildcard runs/embedded/record.json),--run.resume)

evidence: $(INSTALLED)
	$(BIN)/pte evidence --preset $(PRESET)

test: $(INSTALLED)
	$(BIN)/python -m pytest $(PYTEST_ARGS)

unit: $(INSTALLED)
	$(BIN)/python -m pytest $(PYTEST_ARGS) -m "not system"

lint: $(INSTALLED)
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/lint-imports

install: $(INSTALLED)

$(INSTALLED): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[dev]"
	touch $@

clean:
	rm -rf .venv build dist src/*.egg-info .pytest_cache .ruff_cache .mypy_cache .import_linter_cache .hypothesis
	find src tests scripts -name __pycache__ -type d -prune -exec rm -rf {} +
