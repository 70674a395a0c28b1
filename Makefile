# make demo | test | lint | bench | cuda | gpu | clean.  Each sets up .venv first: the pinned versions of constraints.txt.
# Another interpreter: make test PYTHON=python3.12
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

# Workers x threads = cores: two workers of one thread each are quicker than one worker of two on the small models of the tests.
WORKERS ?= 2
PYTEST_ARGS ?=

.PHONY: setup demo test lint bench cuda gpu clean

setup: $(STAMP)

$(STAMP): pyproject.toml constraints.txt hatch_build.py $(wildcard compress/kernels/cpu/*)
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "compress needs Python 3.10 or newer: make PYTHON=python3.11 ...")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet -c constraints.txt -e ".[dev]"
	@touch $@

demo: $(STAMP)
	rm -rf out/demo
	$(BIN)/compress run --recipe recipes/demo.yaml --out out/demo

test: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --dist worksteal $(PYTEST_ARGS)

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# Benchmarks that need this repository only; those beside other tools (bench_peers_gptq, bench_faithful*) say what they need.
bench: $(STAMP)
	$(BIN)/python scripts/bench_startup.py
	$(BIN)/python scripts/bench_memory.py --depth
	$(BIN)/python scripts/bench_safe.py

# The CUDA kernels: needs nvcc and no GPU. `gpu` builds, checks and times them on the GPU at hand.
cuda: $(STAMP)
	$(BIN)/python -m compress.kernels.cuda.build
	$(BIN)/python scripts/cuda_resources.py

gpu: $(STAMP)
	PYTHON=$(BIN)/python bash scripts/gpu_check.sh

clean:
	rm -rf out build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis *.egg-info
	find . -name __pycache__ -not -path './$(VENV)/*' -prune -exec rm -rf {} +
