# make demo    set up .venv and generate out/demo.mp4 with the shipped toy model
# make test    set up .venv with the developer tools and run the tests       (make test ARGS='-k mask' JOBS=1)
# make lint    ruff, codespell        make types   mypy        make check   lint, types, tests
# make clean   remove .venv and everything else that was built; videos in out/ stay
#
# PYTHON chooses the interpreter that .venv is made from: make demo PYTHON=python3.12

PYTHON ?= python3
JOBS ?= 2
ARGS ?=

BIN := .venv/bin
INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt
DESCRIPTION := pyproject.toml setup.py constraints.txt
PROMPT := a red circle moving right

.DEFAULT_GOAL := help
.NOTPARALLEL:
.PHONY: help demo test lint types check setup setup-dev clean

help:
	@sed -n '/^[^#]/q; s/^# \{0,1\}//p' Makefile

# A .venv that works is kept, whoever made it; one that does not run is made anew.
define environment
if ! $(BIN)/python -c '' 2>/dev/null; then \
	$(PYTHON) -c 'import sys; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 13))' 2>/dev/null || \
		{ echo "hiar needs Python 3.10 to 3.13, and '$(PYTHON)' is not one: make $(MAKECMDGOALS) PYTHON=/path/to/python3.12" >&2; exit 1; }; \
	$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || \
		{ echo "'$(PYTHON)' lacks the venv module (Debian, Ubuntu: apt install python3-venv)" >&2; exit 1; }; \
	echo "Creating .venv with $$($(PYTHON) --version)"; \
	$(PYTHON) -m venv --clear .venv || exit 1; \
fi; \
$(BIN)/python -m pip --version >/dev/null 2>&1 || $(BIN)/python -m ensurepip --upgrade >/dev/null
endef

# The stamps lie inside .venv: they go when it goes, and are older than the description when that has changed.
.venv/installed: $(DESCRIPTION)
	@$(environment)
	@echo "Installing hiar-kernels into .venv (the first time this fetches torch: some minutes)"
	@$(INSTALL) -e .
	@touch $@

.venv/installed-dev: $(DESCRIPTION)
	@$(environment)
	@echo "Installing hiar-kernels and its developer tools into .venv (the first time this fetches torch: some minutes)"
	@$(INSTALL) -e '.[dev]'
	@touch .venv/installed $@

setup: .venv/installed
setup-dev: .venv/installed-dev

demo: setup
	@mkdir -p out
	$(BIN)/hiar generate "$(PROMPT)" -o out/demo.mp4
	@echo
	@echo "Look at out/demo.mp4: it should show what the prompt says, $(PROMPT), at an even pace from the first frame"
	@echo "to the last. Now try your own: $(BIN)/hiar generate \"a blue square moving up fast\" -o out/mine.mp4"

# One thread for each of JOBS workers: torch would otherwise start a thread per core in every one of them.
test: setup-dev
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(JOBS) $(ARGS)

lint: setup-dev
	@$(BIN)/python -m ruff check .
	@$(BIN)/python -m codespell_lib

types: setup-dev
	@$(BIN)/python -m mypy

check: lint types test

clean:
	rm -rf .venv build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis .benchmarks
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
