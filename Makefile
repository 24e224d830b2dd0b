# make demo | test | bench      each sets up a virtual environment and builds the extension first, and reuses them
# make bench-cuda               measures on the GPU and writes bench/results/<its name>.md and .json
# make build                    only that
# make format | check           formats the sources | only says what is not formatted
# make clean | distclean        removes what was built | and the virtual environments
#
#   PYTHON=python3.12           the interpreter of the virtual environment
#   TORCH='torch==2.13.0'       the torch to install there
#   OTHER_TORCH=                no test of the binary against another torch (it needs a second virtual environment)
#   BACKENDS='cpu emulated'     what runs the tests: cpu, emulated, avx512-emulated, cuda
#   PYTEST_ARGS='-k layouts'    added to every pytest command
#   DEMO_ARGS=, BENCH_ARGS=     added to the demo's and the benchmark's
# and the switches of the build: FORCE_CUDA, DSCONV_CPU_ONLY, CUDA_HOME, TORCH_CUDA_ARCH_LIST, MAX_JOBS, DEBUG.

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DELETE_ON_ERROR:
MAKEFLAGS += --no-builtin-rules

PYTHON ?= python3
TORCH ?= torch>=2.10
OTHER_TORCH ?= torch==2.13.0

VENV := .venv
OTHER_VENV := .venv-other-torch
# Twice quiet: warnings of the machine's own pip configuration say nothing about this project.
PIP_INSTALL := -m pip install --quiet --quiet --disable-pip-version-check
export PATH := $(CURDIR)/$(VENV)/bin:$(PATH)

# The stamps carry the requirement, so that another TORCH installs again.
as_file_name = $(shell echo '$(1)' | tr -c 'A-Za-z0-9.\n' '_')
VENV_READY := $(VENV)/ready-$(call as_file_name,$(TORCH))
OTHER_VENV_READY := $(OTHER_VENV)/ready-$(call as_file_name,$(OTHER_TORCH))

# Enough to look at the thing: the GPU that is there, or one architecture where there is none.
QUICK_ARCHITECTURES := $(shell nvidia-smi -L >/dev/null 2>&1 && echo native || echo 9.0+PTX)
demo bench bench-cuda: export TORCH_CUDA_ARCH_LIST ?= $(QUICK_ARCHITECTURES)

# Threads that wait leave their core to those that work: where other processes want the cores too, as the tests' own do,
# spinning threads cost several times the whole time. Benchmarks keep the default.
demo test: export OMP_WAIT_POLICY ?= passive

.PHONY: build demo test bench bench-cuda format check clean distclean

demo: build
	python -m bench.demo $(DEMO_ARGS)

bench: build
	python -m bench $(BENCH_ARGS)

bench-cuda: build
	python -m bench --device cuda $(BENCH_ARGS)

# The compilers' command lines go to build/build.log; of each, its number and its file are shown.
build: $(VENV_READY)
	mkdir -p build
	python setup.py build_ext --inplace 2>&1 | tee build/build.log | \
	  sed -uE 's/^(\[[0-9]+\/[0-9]+\]) .* -c ([^ ]+) -o .*/\1 \2/; /^(c\+\+|g\+\+|gcc|cc) .* -shared /d'

$(VENV_READY): .ci/requirements.txt .ci/requirements-format.txt
	test -x $(VENV)/bin/python || $(PYTHON) -m venv $(VENV)
	@echo 'Installing $(TORCH) and what else is needed into $(VENV): several gigabytes where torch has CUDA'
	$(VENV)/bin/python $(PIP_INSTALL) '$(TORCH)' -r .ci/requirements.txt
	rm -f $(VENV)/ready-*
	touch $@

$(OTHER_VENV_READY):
	test -x $(OTHER_VENV)/bin/python || $(PYTHON) -m venv $(OTHER_VENV)
	@echo 'Installing $(OTHER_TORCH) into $(OTHER_VENV), to test the binary against another torch'
	$(OTHER_VENV)/bin/python $(PIP_INSTALL) '$(OTHER_TORCH)' numpy ninja pybind11 setuptools wheel
	rm -f $(OTHER_VENV)/ready-*
	touch $@

$(VENV)/formatters: .ci/requirements-format.txt
	test -x $(VENV)/bin/python || $(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python $(PIP_INSTALL) -r .ci/requirements-format.txt
	touch $@

format: $(VENV)/formatters
	.ci/format

check: $(VENV)/formatters
	.ci/format --check

ifneq ($(OTHER_TORCH),)
test: $(OTHER_VENV_READY)
test: export DSCONV_OTHER_PYTHON := $(CURDIR)/$(OTHER_VENV)/bin/python
endif
# The same numerical tests on everything that can run them here. The CUDA kernels run compiled for the host, and on the
# GPU where there is one; the AVX-512 kernels natively or on emulated intrinsics. A failure does not stop the next run.
# loadgroup: the tests of a module that share a slow build stay in one process.
PYTEST := python -m pytest -n 2 --dist loadgroup -q -rs --durations 10
BACKENDS ?= cpu emulated \
  $(shell grep -qw avx512vl /proc/cpuinfo || echo avx512-emulated) \
  $(shell nvidia-smi -L >/dev/null 2>&1 && echo cuda)
test: build
	status=0; \
	for backend in $(BACKENDS); do \
	  echo "=== pytest --backend=$$backend"; \
	  $(PYTEST) --backend=$$backend $(PYTEST_ARGS) || status=$$?; \
	done; \
	exit $$status

clean:
	rm -rf build dist *.egg-info dsconv_cuda/_C*.so .cache .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -not -path './.venv*' -prune -exec rm -rf {} +

distclean: clean
	rm -rf .venv*
