# make demo | test | slow-test | gpu-test | lint | format | readme
# Each sets up .venv first; nothing is installed outside it.
# WEIGHTS=DIR also tests on a folder of trained checkpoints.

PYTHON ?= $(shell command -v python3.11 || command -v python3)
WEIGHTS ?=
JOBS ?= 2

BIN := .venv/bin
READY := .venv/.ready
PYTEST := $(BIN)/python -m pytest -q -n $(JOBS) $(if $(WEIGHTS),--weights=$(WEIGHTS))

.PHONY: demo test slow-test gpu-test lint format readme clean

demo: $(READY)
	$(BIN)/taut demo

test: lint
	$(PYTEST)

slow-test: $(READY)
	$(PYTEST) --slow

gpu-test: $(READY)
	$(BIN)/python -m pytest -q -m gpu

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --pythonpath $(BIN)/python

format: $(READY)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# Puts the true output of the demo and the table of techniques into the README.
readme: $(READY)
	$(BIN)/python tests/test_readme.py

# torch goes first and alone: pip then takes the small build for machines without a GPU wherever it is offered one.
$(READY): pyproject.toml constraints.txt
	@echo "setting up .venv; this takes some minutes"
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check $(shell grep '^torch==' constraints.txt)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	touch $(READY)

clean:
	rm -rf .venv
