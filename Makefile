# Each target is enough on a fresh machine with Python 3.11 or 3.12, make and a package index.
# On a machine with a GPU, `make quickstart CONSTRAINTS=` installs the newest build of torch instead of the CPU's.
PYTHON ?= $(shell command -v python3.12 || command -v python3.11 || command -v python3)
CONSTRAINTS ?= -c constraints.txt
VENV := .venv
BIN := $(VENV)/bin

.PHONY: quickstart test lint types install clean

install: $(VENV)/.installed

$(VENV)/.installed: pyproject.toml constraints.txt tests/oracles.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet $(CONSTRAINTS) -e '.[test,lint]'
	$(BIN)/python -m pip install --quiet --no-deps -r tests/oracles.txt
	touch $@

quickstart: install
	$(BIN)/python cli.py fit --config configs/quickstart.yaml

test: install
	$(BIN)/python -m pytest -n 2

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: install
	$(BIN)/mypy

clean:
	rm -rf $(VENV) build *.egg-info .pytest_cache .mypy_cache .ruff_cache
