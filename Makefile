# Two commands on a fresh machine: `make demo` and `make test`. Each sets up .venv by itself.
# GPU targets use the interpreter that is given: make gpu-test PYTHON=python3

BOOTSTRAP ?= $(shell command -v python3.11 || command -v python3.12 || command -v python3.13 || command -v python3)
SHELL := /bin/bash -o pipefail
VENV := .venv
PYTHON ?= $(VENV)/bin/python
READY := $(VENV)/.ready

.PHONY: demo test test-slow check gpu-test kernels-all bench lock clean

$(READY): requirements.lock pyproject.toml
	$(BOOTSTRAP) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "ridgeline needs Python 3.11 or later")'
	$(BOOTSTRAP) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check --progress-bar off -r requirements.lock
	$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation --editable .
	@touch $(READY)

demo: $(READY)
	@$(VENV)/bin/ridgeline generate --explain --speculative-config tree

# Tests that wait, time, or are processes talking to each other have the machine alone. The others share it, each worker
# with one thread (those about threads ask for more); a file stays with one worker.
ALONE := tests/dashboard tests/engine tests/server tests/workload tests/study/test_tune.py
WORKERS ?= 2
SHARED := OMP_NUM_THREADS=1 $(VENV)/bin/python -m pytest --numprocesses $(WORKERS)

test: $(READY)
	$(SHARED) --dist loadfile tests $(ALONE:%=--ignore=%) -m "not slow and not gpu and not interpret"
	$(VENV)/bin/python -m pytest $(ALONE) -m "not slow and not gpu and not interpret"
	TRITON_INTERPRET=1 $(SHARED) --dist worksteal tests/kernels/triton -m "interpret and not slow"

# Its last result stays in the tree: tests/slow-results.txt.
test-slow: $(READY)
	{ date -u +%F; git rev-parse HEAD; $(VENV)/bin/python -m pytest tests -m "slow and not gpu and not interpret"; } \
		2>&1 | tee tests/slow-results.txt

check: $(READY)
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy

# Needs a CUDA device, torch, triton, transformers and pytest in the interpreter named by PYTHON.
gpu-test:
	PYTHONPATH=src $(PYTHON) -m pytest tests -m gpu

# Every instance of every .cu, for each architecture it names; needs no GPU. Tests compile a pairwise cover.
kernels-all: $(READY)
	$(VENV)/bin/python -m ridgeline.kernels.cuda.instances

bench: $(READY)
	$(VENV)/bin/python -m benchmarks.run

lock: $(READY)
	$(VENV)/bin/python -m pip freeze --exclude-editable --all

clean:
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache .hypothesis build dist src/*.egg-info
