# The project's commands. Each sets up what it needs, in .venv and node_modules.
#
#   make book           run every chapter and build the book; QUICK=1 runs them with the parameters of book/quick.yml
#   make pdf            the book that make book made, as one PDF; needs a Chromium
#   make test           the fast tests; ARGS="..." goes to pytest
#   make lint           ruff, mypy and import-linter
#
# They take python3, or the one that is given: make test PYTHON=python3.12

PYTHON ?= python3
BIN := .venv/bin
INSTALLED := .venv/.installed
VENDOR := book/_assets/vendor

.PHONY: help book pdf test lint assets clean

help:
	@echo "make book    run every chapter, build the book (QUICK=1: small parameters)"
	@echo "make pdf     the built book as one PDF (needs Chromium)"
	@echo "make test    fast tests (ARGS=... for pytest)"
	@echo "make lint    ruff, mypy and import-linter"
	@echo "make clean   remove what was built; .venv and data stay"

book: $(INSTALLED) assets
	$(BIN)/python book/build.py $(if $(QUICK),--quick)

pdf: $(INSTALLED)
	$(BIN)/python book/pdf.py

test: $(INSTALLED)
	$(BIN)/python -m pytest -n auto --dist loadfile $(ARGS)

lint: $(INSTALLED)
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/lint-imports

# An environment that was not finished, or is of another Python, is made anew.
$(INSTALLED): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "ATHENA needs Python 3.11 or newer, and $(PYTHON) is $$($(PYTHON) --version 2>&1)."; \
	  echo "Name another one: make $(MAKECMDGOALS) PYTHON=/path/to/python3.12"; \
	  exit 1; }
	@[ -e $@ ] && [ "$$($(BIN)/python --version)" = "$$($(PYTHON) --version)" ] || $(PYTHON) -m venv --clear .venv
	$(BIN)/python -m pip install --quiet -c constraints.txt -e ".[dev]"
	@touch $@

# The script that pages load, so that the book works offline, and what tests look at them with. Without npm they come over the network.
assets:
	@if ! command -v npm >/dev/null; then \
	  echo "npm is not here: the formulae of the book will be loaded over the network."; \
	elif ! $(MAKE) --no-print-directory $(VENDOR)/.fetched; then \
	  echo "npm could not fetch the scripts: the formulae of the book will be loaded over the network."; \
	fi

$(VENDOR)/.fetched: package.json package-lock.json Makefile
	npm ci --ignore-scripts --no-audit --no-fund --loglevel=error
	mkdir -p $(VENDOR)
	cp node_modules/mathjax/es5/tex-svg.js $(VENDOR)
	@touch $@

clean:
	rm -rf book/_build $(VENDOR) node_modules build *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis
