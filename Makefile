# make demo     recycle LoRA adapters on real digits: table, JSON and figure under runs/
# make test     every test but the slow ones
# make slow     the slow ones
# make mutants  do the tests see broken code?
# make bench    what everything costs, beside the committed ratios (on a quiet machine)
# make lint     ruff

PYTHON ?= python3
# The release the committed numbers were measured with. `make TORCH=torch test` takes the newest.
TORCH ?= torch==2.13.0
BIN := .venv/bin
export HF_HUB_DISABLE_TELEMETRY = 1

.PHONY: help demo test slow lint mutants bench clean

help:
	@sed -n 's/^# \(make .*\)/\1/p' Makefile

demo: .venv/installed
	$(BIN)/python train_vit.py

test: .venv/installed
	$(BIN)/python -m pytest -q

slow: .venv/installed
	$(BIN)/python -m pytest -q -m slow

mutants: .venv/installed
	$(BIN)/python -m tests.mutants

bench: .venv/installed
	$(BIN)/python -m figures.costs --measure --out runs/costs.json

lint: .venv/installed
	$(BIN)/ruff check . && $(BIN)/ruff format --check .

.venv/installed: pyproject.toml
	@$(PYTHON) -c 'import sys; v = sys.version.split()[0]; sys.exit(None if sys.version_info >= (3, 11) else f"found Python {v}, need 3.11 or newer: make PYTHON=python3.11 ...")'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet "$(TORCH)"
	$(BIN)/python -m pip install --quiet --editable ".[test]"
	@touch $@

clean:
	rm -rf .venv runs build *.egg-info
