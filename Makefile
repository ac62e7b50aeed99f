# make demo    set up .venv and write out/demo.mp4 and out/compare.mp4: a video, and two orders side by side
# make test    set up .venv with the developer tools and run the tests       (make test ARGS='-k mask' JOBS=1)
#              one tier of them: make test-cpu, test-interpreter, test-compile
#              numbers as other processors compute them: make test-processors; the page of hiar serve: make test-browser
# make test-versions   the tests on the oldest and the newest supported torch and Triton, each in an environment of its own
# make lint    ruff, codespell, hadolint    make types   mypy        make check   lint, types, docs-check, docs, tests
# make gpu-test        run the kernels' tests on the CUDA device; needs only torch, triton, pytest
# make gpu-bench       measure every op on it, into bench/results/; needs pytest-benchmark too (make bench: rehearsal, CPU)
#                      both end after BUDGET seconds; cut short by that or by anything, run again they go on
# make docs            build the documents as a site, out/site/index.html
# make docs-refresh    renew the tables and pictures that commands print into README and docs/
# make docs-check      tell which of them are stale
# make compile-report  write docs/evidence/compile_report.md: registers, spills, tensor cores of every kernel; needs no GPU
# make clean   remove .venv and everything else that was built; videos in out/ stay
#
# PYTHON chooses the interpreter that .venv is made from: make demo PYTHON=python3.12

PYTHON ?= python3
JOBS ?= 2
ARGS ?=
BUDGET ?= 480

BIN := .venv/bin
# pip says what it collects, downloads and installs: nobody looks at a silent line for minutes.
INSTALL := $(BIN)/python -m pip install --disable-pip-version-check -c constraints.txt
DESCRIPTION := pyproject.toml setup.py constraints.txt hiar_kernels/common/extension.py $(wildcard csrc/*.c* csrc/*.h)
NUMERIC := tests/kernels/test_attention.py tests/kernels/test_pointwise.py tests/models/test_transformer.py tests/rollout/test_rollout.py
PROMPT := a red circle moving right
DEMO_MODEL := scenes

.DEFAULT_GOAL := help
.NOTPARALLEL:
.PHONY: help demo test test-versions test-cpu test-processors test-interpreter test-compile test-browser gpu-test gpu-bench bench compile-report hub docs docs-refresh docs-check lint types check setup setup-dev clean

help:
	@sed -n '/^[^#]/q; s/^# \{0,1\}//p' Makefile

# A .venv that works is kept, whoever made it; one that does not run is made anew.
define environment
if ! $(BIN)/python -c '' 2>/dev/null; then \
	$(PYTHON) -c 'import sys; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 14))' 2>/dev/null || \
		{ echo "hiar needs Python 3.10 to 3.14, and '$(PYTHON)' is not one: make $(MAKECMDGOALS) PYTHON=/path/to/python3.12" >&2; exit 1; }; \
	$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || \
		{ echo "'$(PYTHON)' lacks the venv module (Debian, Ubuntu: apt install python3-venv)" >&2; exit 1; }; \
	echo "Creating .venv with $$($(PYTHON) --version)"; \
	$(PYTHON) -m venv --clear .venv || exit 1; \
fi; \
$(BIN)/python -m pip --version >/dev/null 2>&1 || $(BIN)/python -m ensurepip --upgrade >/dev/null
endef

# torch comes first: the CUDA extension is built against its headers. pip keeps what a build says to itself.
extension = $(BIN)/python hiar_kernels/common/extension.py

# The stamps lie inside .venv: they go when it goes, and are older than the description when that has changed.
.venv/installed: $(DESCRIPTION)
	@$(environment)
	@echo "1 of 3: torch into .venv, if it is not there (a large download: minutes)"
	@$(INSTALL) torch
	@echo "2 of 3: hiar-kernels and what it needs"
	@$(INSTALL) -e .
	@echo "3 of 3: the CUDA extension, where there is a compiler for it"
	@$(extension)
	@touch $@

# Of 15,000 files of Python the tests import a third: byte code is made when it is needed.
.venv/installed-dev: $(DESCRIPTION)
	@$(environment)
	@echo "1 of 3: torch into .venv, if it is not there (a large download: minutes)"
	@$(INSTALL) --no-compile torch
	@echo "2 of 3: hiar-kernels, what it needs and the developer tools"
	@$(INSTALL) --no-compile -e '.[dev]'
	@echo "3 of 3: the CUDA extension, where there is a compiler for it"
	@$(extension)
	@touch .venv/installed $@

setup: .venv/installed
setup-dev: .venv/installed-dev

demo: setup
	@mkdir -p out
	$(BIN)/hiar generate "$(PROMPT)" --model $(DEMO_MODEL) -o out/demo.mp4 --overwrite
	$(BIN)/hiar compare "$(PROMPT)" --model $(DEMO_MODEL) --num-frames 384 --speed 8 -o out/compare.mp4 --overwrite
	@echo
	@echo "Look at out/compare.mp4, 32 times as long as what the model was trained on: on the left, where blocks see a clean"
	@echo "past, errors pile up, and the background and then the shape go astray; on the right, with the same weights, noise and"
	@echo "prompt, HiAR shows every block its past at matched noise, and they hold longer. out/compare.drift.png has the figures"
	@echo "(this prompt: above; mean of 64 prompts: 85% of frames valid against 67%)."
	@echo "Now try your own: $(BIN)/hiar generate \"a blue square moving up fast\" -o out/mine.mp4"

# One thread for each of JOBS workers: torch would otherwise start a thread per core in every one of them. Each begins
# with a run of files, and takes from another when it has done: what a file prepares is prepared once.
# Byte code is kept even where the environment says no (images of Python do): the processes that tests start need it too.
# Plugins that no test uses are off: every one hears of every test.
# ARGS may choose tests of one tier alone: that the others then have none (exit status 5) is no failure.
tier = PYTHONDONTWRITEBYTECODE= OMP_NUM_THREADS=1 $(BIN)/python -m pytest -p no:benchmark -p no:anyio -p no:subtests -n $(JOBS) --dist worksteal -m $(1) $(ARGS) $(if $(strip $(ARGS)),|| [ $$? -eq 5 ])

# What the three take on two cores that are otherwise idle. A tier that fails does not keep the next one from running.
test: setup-dev
	@failed=; for tier in "cpu 4" "interpreter 2" "compile 2"; do \
		set -- $$tier; echo "tests: $$1 (about $$2 minutes on two cores)"; \
		$(MAKE) --no-print-directory test-$$1 || failed="$$failed $$1"; \
	done; \
	if [ -n "$$failed" ]; then echo "failed:$$failed" >&2; exit 1; fi

test-cpu: setup-dev
	@$(call tier,cpu)

# Numbers as processors without AVX-512, and without AVX2, compute them: torch has other code for each.
test-processors: setup-dev
	@failed=; for capability in default avx2; do \
		echo "tests: numbers with ATEN_CPU_CAPABILITY=$$capability"; \
		ATEN_CPU_CAPABILITY=$$capability $(MAKE) --no-print-directory test-cpu ARGS="$(NUMERIC)" || failed=1; \
	done; [ -z "$$failed" ]

# Triton reads the variable when it is imported: a process of its own.
test-interpreter: setup-dev
	@TRITON_INTERPRET=1 $(call tier,interpreter)

test-compile: setup-dev
	@$(call tier,compile)

# The page of hiar serve in a headless Chromium. Without one they are left out, and in CI they fail.
test-browser: setup-dev
	@if [ "$$CI" = true ] || command -v chromium || command -v chromium-browser || command -v google-chrome; then \
		OMP_NUM_THREADS=1 $(BIN)/python -m pytest -p no:benchmark -m browser tests/serve $(ARGS) \
			$(if $(strip $(ARGS)),|| [ $$? -eq 5 ]); \
	else \
		echo "left out: the tests of the page need Chromium (Debian, Ubuntu: apt install chromium)"; \
	fi

# The supported range, ends included: torch-triton. docs/contributing/compatibility.md has what they gave, with the date.
VERSIONS := 2.11.0-3.6.0 2.15.0-3.9.0

# Every tier of every pair runs, whatever failed before it; a pair's environment stays, in .venv-TORCH-TRITON.
test-versions:
	@status=0; for pair in $(VERSIONS); do \
		torch=$${pair%-*} triton=$${pair#*-}; \
		$(PYTHON) -c 'import sys; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 14))' || exit 1; \
		echo "torch $$torch, Triton $$triton: .venv-$$pair (torch is a large download: minutes)"; \
		test -x .venv-$$pair/bin/python || $(PYTHON) -m venv .venv-$$pair || exit 1; \
		sed "s/^torch==.*/torch==$$torch/; s/^triton==.*/triton==$$triton/; /^setuptools==/d" constraints.txt > .venv-$$pair/constraints.txt; \
		.venv-$$pair/bin/python -m pip install --disable-pip-version-check -c .venv-$$pair/constraints.txt -e '.[dev]' || exit 1; \
		for tier in cpu interpreter compile; do \
			echo "torch $$torch, Triton $$triton: tests, $$tier"; \
			TRITON_INTERPRET=$$([ $$tier = interpreter ] && echo 1 || echo 0) OMP_NUM_THREADS=1 .venv-$$pair/bin/python \
				-m pytest -p no:benchmark -n $(JOBS) -m $$tier $(ARGS) || [ $$? -eq 5 ] || status=1; \
		done; \
	done; exit $$status

# .venv where there is one, unless PYTHON says otherwise; nothing is installed.
GPU_PYTHON := $(if $(filter file,$(origin PYTHON)),$(if $(wildcard $(BIN)/python),$(BIN)/python,$(PYTHON)),$(PYTHON))

define gpu_check
import importlib.util, sys
goal, *needs = sys.argv[1:]
absent = [name for name in needs if importlib.util.find_spec(name) is None]
if absent: sys.exit(f"{goal} needs {', '.join(absent)}, not installed for {sys.executable}")
import torch
if not torch.cuda.is_available(): sys.exit(f"{goal} needs a CUDA device, torch {torch.__version__} finds none")
print(torch.cuda.get_device_name(), "torch", torch.__version__)
endef
export gpu_check

# One process each, without the plugins that happen to be installed; bench/lib/resume.py keeps what has passed in out/.
gpu_run = @env -u TRITON_INTERPRET PYTEST_DISABLE_PLUGIN_AUTOLOAD=1 PYTHONPATH=. $(GPU_PYTHON) -m pytest \
	-p bench.lib.resume --resume out/$@.jsonl --budget $(BUDGET)

gpu-test:
	@$(GPU_PYTHON) -c "$$gpu_check" "make $@" torch triton pytest
	@$(GPU_PYTHON) hiar_kernels/common/extension.py
	$(gpu_run) -m gpu tests/interpreter tests/gpu $(ARGS)

gpu-bench:
	@$(GPU_PYTHON) -c "$$gpu_check" "make $@" torch triton pytest pytest_benchmark
	@$(GPU_PYTHON) hiar_kernels/common/extension.py
	$(gpu_run) -p pytest_benchmark.plugin bench --benchmark-only $(ARGS)

bench: setup-dev
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest bench --benchmark-only $(ARGS)

# A kernel of the Hugging Face hub: a project for kernel-builder, and its builds.
hub: setup-dev
	@$(BIN)/python hub/make.py out/hub

compile-report: setup-dev
	@$(BIN)/python -m hiar_kernels.compile_report --markdown docs/evidence/compile_report.md

# Strict: a link that leads nowhere, or an address that a browser would fetch from elsewhere, fails.
docs: setup-dev
	@NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build
	@$(BIN)/python docs/self_contained.py out/site
	@echo "open out/site/index.html"

docs-refresh: setup-dev
	@$(BIN)/python docs/refresh.py

docs-check: setup-dev
	@$(BIN)/python docs/refresh.py --check

lint: setup-dev
	@$(BIN)/python -m ruff check .
	@$(BIN)/python -m codespell_lib
	@$(BIN)/hadolint docker/*.Dockerfile

types: setup-dev
	@$(BIN)/python -m mypy

check: lint types docs-check docs test

clean:
	rm -rf .venv .venv-* build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis .benchmarks
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
