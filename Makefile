# One environment in .venv for the gateway, the engine and the Petals host.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check

.PHONY: setup run test lint format web bench clean

setup: $(VENV)/.installed

run: setup web
	$(BIN)/petals-chat serve $(ARGS)

test: setup $(VENV)/.installed-dev web
	$(BIN)/python -m pytest $(ARGS)

# The page has nothing to compile: it is put where the package looks for it.
web:
	@mkdir -p src/petals_chat/web
	@cp frontend/* src/petals_chat/web/

bench: setup $(VENV)/.installed-dev web
	$(BIN)/python bench/token_path.py $(ARGS)

lint: setup $(VENV)/.installed-dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

format: $(VENV)/.installed-dev
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean:
	rm -rf $(VENV) build dist

$(VENV)/.installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "Petals Chat needs Python 3.11 or newer: make PYTHON=/path/to/python3.11 $(MAKECMDGOALS)"; exit 1; }
	$(PYTHON) -m venv $(VENV)
	@# torch first, by its exact version: what comes after then finds its need of torch met
	$(PIP) install --quiet $$(grep '^torch==' constraints.txt)
	$(PIP) install --quiet -c constraints.txt -e .
	@# docs/decisions/0001-petals-without-its-pins.md says why --no-deps
	$(PIP) install --quiet --no-deps petals==2.2.0.post1
	touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	$(PIP) install --quiet -c constraints.txt -e ".[dev]"
	touch $@
