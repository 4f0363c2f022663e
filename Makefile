# Needs only Python 3.11 or newer and make; everything is installed into .venv.
PYTHON ?= python3
BIN := .venv/bin
INSTALL := $(BIN)/python -m pip install --disable-pip-version-check -c constraints.txt

.PHONY: help quickstart test slow check ledger bench-check results docs fix

help:  ## list these targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "make %-12s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

quickstart: .venv/installed-quickstart  ## train on handwritten digits and write a report
	$(BIN)/mergevq quickstart

# Workers and the processes of tests would each compile every module anew.
unexport PYTHONDONTWRITEBYTECODE
# One thread: the tests' tensors are too small to share.
test slow check ledger bench-check results: export OMP_NUM_THREADS := 1
test: .venv/installed-dev  ## run the default tests
	$(BIN)/python -m pytest -q -n auto --dist worksteal

slow: .venv/installed-dev  ## run the tests that take longer
	$(BIN)/python -m pytest -q -n auto -m "slow and not gpu"

check: .venv/installed-dev  ## lint, types, layers, default tests
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/pyright
	$(BIN)/lint-imports --no-logo
	$(BIN)/python -m pytest -q -n auto --dist worksteal

ledger: .venv/installed-dev  ## losses of every recipe equal those of BASE, by default where the branch began
	$(BIN)/python benchmarks/ledger.py $(BASE)

bench-check: .venv/installed-dev  ## ratios to plain definitions are not much below those of docs/results/ratios.json
	$(BIN)/python -m benchmarks.ratios --check

results: .venv/installed-dev  ## measure the models of the package again, with the data and weights in FOLDER
	$(BIN)/python -m benchmarks.results $(FOLDER)

docs: .venv/installed-docs  ## build the documentation into site/
	$(BIN)/mkdocs build --strict

fix: .venv/installed-dev  ## format, and repair what the linter can
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit("mergevq needs Python 3.11 or newer, and $(PYTHON) is "\
	  + sys.version.split()[0] + "; name another: make PYTHON=python3.12" \
	  if sys.version_info < (3, 11) else 0)'
	$(PYTHON) -m venv .venv

# The stamp makes the second call instant. Edited requirements install again.
.venv/installed-%: pyproject.toml constraints.txt | $(BIN)/python
	$(INSTALL) -e '.[$*]'
	@touch $@
