# Each target is enough on a fresh machine with Python 3.11 or 3.12, make and a package index.
# On a machine with a GPU, `make quickstart CONSTRAINTS=` installs the newest build of torch instead of the CPU's.
# The first of these that runs and can make an environment: a version manager's stub may answer to a name and fail.
PYTHON ?= $(shell for p in python3.12 python3.11 python3; do $$p -c 'import ensurepip, sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$p && break; done)
CONSTRAINTS ?= -c constraints.txt
VENV := .venv
BIN := $(VENV)/bin

.PHONY: quickstart test lint types house docs install clean

install: $(VENV)/.installed

$(VENV)/.installed: pyproject.toml constraints.txt tests/oracles.txt
	@test -n "$(PYTHON)" || { echo "no Python 3.11 or newer that can make a virtual environment: install one (with its venv module), or give PYTHON=/path/to/python"; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet $(CONSTRAINTS) -e '.[dev]'
	$(BIN)/python -m pip install --quiet --no-deps -r tests/oracles.txt
	touch $@

quickstart: install
	$(BIN)/python cli.py fit --config configs/quickstart.yaml

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
	$(BIN)/python docs/tools/house.py

docs: install
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

clean:
	rm -rf $(VENV) build *.egg-info .pytest_cache .mypy_cache .ruff_cache
