# From bare Python >= 3.11 and make.  The logic stands in tools/*.py; this file says what needs what.

PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/installed

# Outputs that git keeps: those of checked cells.  Without --keep-count nbval fails every one of them.
STRIP := $(BIN)/nbstripout --keep-count --keep-id --extra-keys "metadata.language_info.version"
NBVAL := --nbval-lax --nbval-current-env --nbval-cell-timeout 300 -n 2 --dist loadfile

# One framework thread per process: two notebooks run side by side.
export OMP_NUM_THREADS := 1
export MKL_NUM_THREADS := 1
export TF_NUM_INTRAOP_THREADS := 1
export TF_NUM_INTEROP_THREADS := 1

.DEFAULT_GOAL := help
.PHONY: help book test lab check outputs format clean

help:  ## this list
	@echo "Targets (PYTHON=... names another Python than python3):"
	@sed -n 's/^\([a-z]*\):.*##/  make \1\t/p' $(MAKEFILE_LIST) | expand -t 16

book: $(STAMP)  ## execute the notebooks and build the pages into _build/html
	@$(BIN)/python tools/build.py

test: $(STAMP)  ## unit tests, every notebook, JupyterLab and the built book in a headless Chromium
	$(BIN)/pytest -q -n 2 --dist loadgroup --ignore=tests/book --ignore=tests/lab tests
	$(BIN)/pytest -q $(NBVAL) notebooks
	$(BIN)/pytest -q tests/lab
	$(BIN)/pytest -q -n 2 --dist loadgroup tests/book

lab: $(STAMP)  ## JupyterLab on the notebooks (LAB_ARGS=... adds options, as --allow-root)
	$(BIN)/jupyter lab --notebook-dir=notebooks $(LAB_ARGS)

check: $(STAMP)  ## style of code and notebooks, stripped outputs, spelling, links
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(STRIP) --verify notebooks/*.ipynb
	$(BIN)/codespell
	$(BIN)/python tools/links.py

outputs: $(STAMP)  ## execute the notebooks and refresh the outputs that git keeps
	@$(BIN)/python tools/build.py --execute
	@$(BIN)/python tools/outputs.py
	@$(STRIP) notebooks/*.ipynb

format: $(STAMP)  ## let ruff fix the style
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:  ## remove everything built; the environment stays
	rm -rf _build .pytest_cache .ruff_cache

$(STAMP): pyproject.toml constraints.txt tools/bootstrap.py
	@$(PYTHON) tools/bootstrap.py $(VENV)
	@touch $@
