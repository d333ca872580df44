# Each target is enough on a fresh machine with Python 3.11 or newer, make and a package index.
# `make quickstart CONSTRAINTS=` takes the newest versions instead of those that constraints.txt names.
# The first of these that runs and can make an environment: a version manager's stub may answer to a name and fail.
PYTHON ?= $(shell for p in python3.12 python3.11 python3.13 python3.14 python3; do $$p -c 'import ensurepip, sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$p && break; done)
CONSTRAINTS ?= -c constraints.txt
VENV := .venv
BIN := $(VENV)/bin
NEEDS := pyproject.toml constraints.txt docs/tools/install.py

.PHONY: quickstart test lint types house docs install clean python

quickstart: $(VENV)/.run
	$(BIN)/mini_gpt_pl fit -c quickstart

# What a run of the quick start needs, and nothing else.
$(VENV)/.run: $(NEEDS) | python
	$(PYTHON) docs/tools/install.py $(VENV) cli,data,wandb $(CONSTRAINTS)
	@touch $@

install: $(VENV)/.dev

# All that tests, linters, notebooks and documentation need, too.
$(VENV)/.dev: $(NEEDS) tests/oracles.txt | python
	$(PYTHON) docs/tools/install.py $(VENV) dev $(CONSTRAINTS) -r tests/oracles.txt
	@touch $@ $(VENV)/.run

python:
	@test -n "$(PYTHON)" || { echo "no Python 3.11 or newer that can make a virtual environment: install one (with its venv module), or give PYTHON=/path/to/python"; exit 1; }

test: install
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

lint: install house
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	cd build/house && ../../$(BIN)/lint-imports --no-logo --cache-dir ../import_linter ../../pyproject.toml

types: install house
	$(BIN)/mypy

# The package as it is installed, as links, in build/house: what the checkers of types and imports and the docs read.
house: install
	@$(BIN)/python docs/tools/house.py

docs: install
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

clean:
	rm -rf $(VENV) build *.egg-info .pytest_cache .mypy_cache .ruff_cache
