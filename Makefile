# Everything happens in .venv: `make demo` trains a small model, `make test` runs every check a machine without a GPU can run.
PYTHON ?= python3
TORCH ?= torch==2.13.0
# Beside a CPU build of torch only; a CUDA build brings the Triton it was tested with.
TRITON ?= triton==3.6.0
VENV := .venv
PY := $(VENV)/bin/python
# Small tensors on many test processes: one thread each is fastest, and keeps results repeatable.
TESTS := OMP_NUM_THREADS=1 $(PY) -m pytest
JOBS ?= 2
# A process that dies fails the run: pytest-xdist 3.8 may wait for ever for the files of one that it has replaced.
# In the order of tests/conftest.py, where the longest files come first: it would begin with those of the most tests.
PARALLEL := -n $(JOBS) --dist loadfile --no-loadscope-reorder --max-worker-restart 0

.PHONY: demo test test-all lint format bench aot wheel clean

demo: $(VENV)/.installed
	$(VENV)/bin/fastlm demo

test: $(VENV)/.test lint
	$(TESTS) $(PARALLEL) -q -m "not slow"

test-all: $(VENV)/.test lint
	$(TESTS) $(PARALLEL) -q

lint: $(VENV)/.test
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .

format: $(VENV)/.test
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .

bench: $(VENV)/.test
	$(PY) -m benchmarks run --suite quick

aot: $(VENV)/.test
	$(PY) -m benchmarks.aot

# One wheel for every Python and every torch from 2.11 on; with the CUDA kernels where nvcc is (no GPU is needed).
wheel: $(VENV)/.installed
	rm -f dist/fastlm-*.whl
	FASTLM_CUDA=1 $(PY) -m pip wheel --quiet --no-deps --no-build-isolation --wheel-dir dist .
	@$(PY) -m zipfile -l dist/fastlm-*.whl | grep libfastlm_cuda.so \
	  || echo "The wheel has no CUDA kernels: nvcc was not found (CUDA_HOME, PATH)."

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

# Installed without build isolation: an isolated build would fetch a second torch.
$(VENV)/.installed: pyproject.toml setup.py csrc/host.cpp | $(VENV)/bin/python
	$(PY) -m pip install --quiet --upgrade pip "setuptools>=77" wheel pybind11
	$(PY) -m pip install --quiet "$(TORCH)"
	$(PY) -m pip install --quiet --no-build-isolation --editable .
	touch $@

$(VENV)/.test: $(VENV)/.installed
	$(PY) -m pip install --quiet --no-build-isolation --editable ".[test]"
	$(PY) -c "import triton" 2>/dev/null || $(PY) -m pip install --quiet "$(TRITON)"
	$(PY) -m pip install --quiet --no-deps nvidia-cutlass==4.2.0.0  # CuTe's headers (6 MB); what it asks for is not needed
	touch $@

clean:
	rm -rf build dist *.egg-info runs .pytest_cache .ruff_cache
