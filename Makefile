# Everything sets itself up: `make demo` and `make test` work on a machine with nothing but Python 3.11+.
PYTHON ?= python3
VENV   ?= .venv
# Pinned together: each torch release has one triton. `make TORCH=torch==2.15.0 TRITON=triton==3.9.0 ...` for another.
TORCH  ?= torch==2.13.0
TRITON ?= triton==3.7.1

BIN := $(VENV)/bin
# Installing builds the C++ kernels.
NATIVE := setup.py aotrain/_build.py $(wildcard csrc/cpu/*)
# Spinning threads of several processes on few cores are up to 20 times slower than one thread each.
export OMP_NUM_THREADS ?= 1

.PHONY: demo test test-slow check serve-check clean

demo: $(VENV)/titan.stamp
	$(BIN)/python scripts/demo.py

test: $(VENV)/dev.stamp check
	$(BIN)/python -m pytest -n 2 -m "not slow"

test-slow: $(VENV)/dev.stamp
	$(BIN)/python -m pytest -m slow

check: $(VENV)/dev.stamp
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyrefly check --python-interpreter-path $(BIN)/python

# Not part of `make test`: installs a CPU build of vLLM, repackaged by one person, into an environment of its own.
# `make serve-check MODEL=path/to/checkpoint TEXT=file.txt`
serve-check: $(VENV)/dev.stamp
	$(BIN)/python scripts/serve_check.py $(MODEL) $(TEXT)

clean:
	rm -rf $(VENV) runs

# torch and its triton first and alone: with them in place the other packages do not ask for other builds of them.
$(VENV)/torch.stamp: Makefile
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip "setuptools>=77"
	$(BIN)/python -m pip install --quiet $(TORCH)
	$(BIN)/python -m pip install --quiet $(TRITON)
	touch $@

$(VENV)/titan.stamp: $(VENV)/torch.stamp pyproject.toml $(NATIVE)
	$(BIN)/python -m pip install --quiet --no-build-isolation --editable ".[titan]"
	touch $@

$(VENV)/dev.stamp: $(VENV)/torch.stamp pyproject.toml $(NATIVE)
	$(BIN)/python -m pip install --quiet --no-build-isolation --editable ".[dev]"
	touch $@
