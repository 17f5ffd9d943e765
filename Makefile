# make demo | examples | bench | bench-quick | test | docs | lint | format | build | clean   ARGS="..." goes to the program that runs
# make cuda-check (compile the CUDA kernels, look at what came out; needs nvcc)    make gpu (everything that needs a GPU)
#
# Each target sets up what it needs on a fresh machine, in .venv, and only what changed since the last time.
# Assumed: python3 and make; a C++ compiler if the native kernels are wanted (without one: pure torch).

PYTHON ?= python3
VENV := .venv
PY := $(VENV)/bin/python
ARGS ?=
WORKERS ?= 2
EXAMPLES ?= $(wildcard examples/s[0-9]_*.py)

ENV_STAMP := $(VENV)/.stamp-environment
INTEGRATIONS_STAMP := $(VENV)/.stamp-integrations
DOCS_STAMP := $(VENV)/.stamp-docs
CONFIG_STAMP := $(VENV)/.stamp-config
BUILD_STAMP := $(VENV)/.stamp-build

# Folders too: theirs is the time that changes when a source is removed.
NATIVE_SOURCES := $(shell find csrc 2>/dev/null) $(wildcard build_tools/*.py) setup.py pyproject.toml
CXX_SOURCES = $(shell find csrc tests -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh')

.PHONY: help demo examples bench bench-quick test docs lint format build cuda-check gpu clean FORCE
.SUFFIXES:

help:
	@sed -n '1,5s/^# \{0,1\}//p' Makefile

demo: $(BUILD_STAMP)
	@$(PY) -m examples.demo $(ARGS)

examples: $(BUILD_STAMP)
	@set -e; for script in $(EXAMPLES); do \
	  name=$${script#examples/}; $(PY) -m examples.$${name%.py} $(ARGS); done

# Into bench/: report.md, result.json, plots. Under 20 minutes and under 3 on two cores that do nothing else.
bench: $(BUILD_STAMP)
	@$(PY) -m benchmarks run --tag full $(ARGS)

bench-quick: $(BUILD_STAMP)
	@$(PY) -m benchmarks run --tag quick $(ARGS)

# One file at a time per process: fixtures of a file are made once.
test: $(BUILD_STAMP) $(INTEGRATIONS_STAMP)
	@$(PY) -m pytest tests -n $(WORKERS) --dist loadfile $(ARGS)

# The documentation site, into build/site. ARGS=serve: on localhost, rebuilt as files change.
docs: ARGS = build --strict
docs: $(BUILD_STAMP) $(DOCS_STAMP)
	@NO_MKDOCS_2_WARNING=1 $(PY) -m mkdocs $(ARGS)

build: $(BUILD_STAMP)
	@echo "fasttransfer is built and up to date"

# sm_75 to sm_120 and PTX; ARGS="--arch 9.0": one of them. Fails on a spill, on local memory, on a symbol torch lacks.
cuda-check: $(ENV_STAMP)
	@$(PY) -m build_tools.ptxas_check $(ARGS)
	@$(PY) -m build_tools.cuda_symbols build/cuda-check/_cuda.so

# With the Python that has a CUDA torch: that of .venv if there is one, else $(PYTHON). Under ten minutes.
gpu:
	@if [ -x $(PY) ]; then python=$(PY); else python=$(PYTHON); fi; $$python -m build_tools.gpu $(ARGS)

lint: $(ENV_STAMP)
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy
	$(VENV)/bin/clang-format --dry-run -Werror $(CXX_SOURCES)

format: $(ENV_STAMP)
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .
	$(VENV)/bin/clang-format -i $(CXX_SOURCES)

clean:
	rm -rf build dist fasttransfer.egg-info fasttransfer/_C.*.so fasttransfer/_cuda.so fasttransfer/_build.json
	rm -f $(BUILD_STAMP) $(CONFIG_STAMP)

$(PY):
	@echo "== setting up the environment (once): $(VENV)"
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "error: requirements-dev.txt needs Python 3.11 or later. PYTHON=python3.12, say, names another."; exit 1; }
	@$(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); \
	  echo "error: '$(PYTHON) -m venv' failed (Debian, Ubuntu: apt install python3-venv). PYTHON=... names another."; \
	  exit 1; }

$(ENV_STAMP): requirements-dev.txt | $(PY)
	@echo "== installing the packages of requirements-dev.txt (once; torch is the large one)"
	@$(PY) -m pip install -qq --disable-pip-version-check -r requirements-dev.txt
	@touch $@

$(INTEGRATIONS_STAMP): requirements-integrations.txt $(ENV_STAMP)
	@echo "== installing the packages of requirements-integrations.txt (once)"
	@$(PY) -m pip install -qq --disable-pip-version-check -r requirements-integrations.txt
	@touch $@

$(DOCS_STAMP): requirements-docs.txt requirements-integrations.txt $(ENV_STAMP)
	@echo "== installing the packages of requirements-docs.txt (once)"
	@$(PY) -m pip install -qq --disable-pip-version-check -r requirements-docs.txt
	@touch $@

# What decides about the build beside the sources; rewritten only where it changed.
$(CONFIG_STAMP): FORCE | $(PY)
	@printf '%s\n' "NATIVE=$$FASTTRANSFER_NATIVE CUDA=$$FASTTRANSFER_CUDA DEBUG=$$FASTTRANSFER_DEBUG CXX=$$CXX" \
	  "$$TORCH_CUDA_ARCH_LIST $$CUDA_HOME $$CUDA_PATH" \
	  "$$(command -v g++ c++ clang++ nvcc)" > $@.new
	@if cmp -s $@.new $@; then rm $@.new; else mv $@.new $@; fi

$(BUILD_STAMP): $(ENV_STAMP) $(CONFIG_STAMP) $(NATIVE_SOURCES)
	@echo "== building fasttransfer (once, and when csrc changes)"
	@$(PY) -m pip install -qq --disable-pip-version-check --no-build-isolation --no-deps --editable .
	@$(PY) -m build_tools.describe
	@touch $@
