# `make demo` and `make test` do everything on a bare machine with Python 3.11 or later; each target below also works by itself.
# No environment needs to be active. PYTHON picks the interpreter, PIP_FLAGS adds options to every pip install.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
PIP_FLAGS ?=
WORKERS ?= 2
SEED ?= 0

VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check $(PIP_FLAGS) -c constraints.txt
PYTEST := FXPARAM_SEED=$(SEED) $(BIN)/pytest

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.NOTPARALLEL:
.PHONY: help env demo test lint types docs unit examples packaging fuzz exhaustive bench zoo build clean

help: ## this list
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "  make %-10s %s\n", $$1, $$2 }' $(firstword $(MAKEFILE_LIST))

env: $(READY) ## the environment in .venv, from exact pins; renewed when the pins or pyproject.toml change

# The build backend comes first, from the pins: without isolation pip builds with it and downloads no other.
$(READY): constraints.txt pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "expected Python 3.11 or later; type: make PYTHON=...")'
	$(PYTHON) -m venv $(VENV)
	$(PIP) hatchling editables
	$(PIP) --no-build-isolation --editable '.[demo,test,docs]'
	touch $@

demo: $(READY) ## train, fold and export a small recurrent model; results in demo-output/
	$(BIN)/python examples/digits_rnn.py

test: lint types docs unit examples packaging ## everything continuous integration checks

lint: $(READY) ## style, formatting of imports, direction of imports
	$(BIN)/ruff check .
	$(BIN)/lint-imports --no-cache

types: $(READY) ## static types
	$(BIN)/mypy

docs: $(READY) ## the documentation in site/, warnings are errors
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet --site-dir site

unit: $(READY) ## the tests of the code
	$(PYTEST) -n $(WORKERS) --dist worksteal --ignore tests/test_docs.py --ignore tests/test_packaging.py

examples: $(READY) ## the code in README.md, docs/, docstrings and examples/
	$(PYTEST) -n $(WORKERS) tests/test_docs.py

packaging: $(READY) ## wheel and sdist, built, compared, installed
	$(PYTEST) tests/test_packaging.py

fuzz: $(READY) ## the property tests and the state machine with many new examples; SEED=n starts elsewhere
	FXPARAM_PROFILE=large $(PYTEST) -n $(WORKERS) -m "hypothesis and not zoo" --hypothesis-seed=$(SEED)

bench: $(READY) ## the measurements behind the figures in the documentation
	@set -e; for file in $(filter-out benchmarks/harness.py,$(wildcard benchmarks/*.py)); do echo "== $$file"; $(BIN)/python $$file; done

exhaustive: $(READY) ## the tests that try all layers with all maps
	$(PYTEST) -n $(WORKERS) -m exhaustive

zoo: $(READY) ## all checks over public model architectures, and their table in docs/zoo.md
	$(PIP) --no-build-isolation --editable '.[demo,test,docs,zoo]'
	$(PYTEST) -n $(WORKERS) -m "zoo or not zoo" tests/zoo
	$(BIN)/python tests/zoo/table.py

build: $(READY) ## wheel and sdist in dist/
	$(BIN)/python -m build --no-isolation --outdir dist

clean: ## remove what the targets made, the environment included
	rm -rf $(VENV) build dist site demo-output .hypothesis .mypy_cache .pytest_cache .ruff_cache .import_linter_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
