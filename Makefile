# One environment in .venv for the gateway, the engine and the Petals host.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
PAGE := src/petals_chat/web/index.html
PAGE_SOURCE := $(shell find frontend -name node_modules -prune -o -type f -print)

.PHONY: setup run test lint format web bench guide clean

setup: $(VENV)/.installed

run: setup web
	$(BIN)/petals-chat serve $(ARGS)

test: setup $(VENV)/.installed-dev web
	$(if $(ARGS),,npm --prefix frontend test)
	$(BIN)/python -m pytest $(ARGS)

# The page, built by Node into the place where the package looks for it.
web: $(PAGE)

bench: setup $(VENV)/.installed-dev web
	$(BIN)/python bench/token_path.py $(ARGS)
	$(if $(ARGS),,$(BIN)/python bench/host_batching.py)
	$(if $(ARGS),,$(BIN)/python bench/private_swarm.py)

# Trains the built-in model anew: about an hour on one core, see training/README.md.
guide: setup $(VENV)/.installed-dev
	$(BIN)/python -m training $(ARGS)

lint: setup $(VENV)/.installed-dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

format: $(VENV)/.installed-dev
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean:
	rm -rf $(VENV) build dist frontend/node_modules $(PAGE) src/petals_chat/web/assets

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

$(PAGE): frontend/node_modules/.installed $(PAGE_SOURCE)
	npm --prefix frontend run --silent build
	@touch $@

frontend/node_modules/.installed: frontend/package.json frontend/package-lock.json
	@node -e 'process.exit(parseInt(process.versions.node) < 20 ? 1 : 0)' 2>/dev/null || { echo "The page is built with Node 20 or newer, which is not here: https://nodejs.org. (The APIs work without the page: make setup, then $(BIN)/petals-chat serve)"; exit 1; }
	npm --prefix frontend ci --no-audit --no-fund
	@touch $@
