# Every target sets up what it needs: on a fresh machine `make demo` is enough.

PYTHON ?= python3
CONSTRAINTS ?= constraints.txt
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
WHEEL_VENV := build/wheel-venv
PYTEST := $(BIN)/python -m pytest -n auto --dist worksteal

.DEFAULT_GOAL := help
.PHONY: help setup demo docs test test-slow test-distributed test-gpu lint format gpu-check bench-solvers bench-growth bench-scale bench-guides bench-compare bench-record bench-literature bench-small bench-lengths sweep-operators sweep-models sweep-loops calibrate notebooks wheel test-wheel clean

help:  ## list the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /:/' | awk -F: '{printf "  make %-13s %s\n", $$1, $$2}'

setup: $(STAMP)  ## create .venv and install everything, once

$(STAMP): pyproject.toml $(CONSTRAINTS)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "Python 3.11 or newer is needed, $(PYTHON) is older: make PYTHON=python3.12 ..." >&2; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint $(CONSTRAINTS) --editable '.[dev]'
	@touch $@

demo: $(STAMP)  ## train GPT-2 at half its memory
	$(BIN)/python -m planner.demo

docs: $(STAMP)  ## build the documentation into build/site
	$(BIN)/python -m sphinx --fail-on-warning --keep-going --quiet \
		-c docs/site -d build/site-cache docs build/site
	@echo "built build/site/index.html"

# Many tests start processes that import all of it.
test test-slow test-distributed: export PYTHONDONTWRITEBYTECODE :=

test: $(STAMP)  ## the quick tests, in about ten minutes
	$(PYTEST)

test-slow: $(STAMP)  ## the tests that take longer
	$(PYTEST) -m 'slow and not gpu and not distributed' --timeout 900 --durations 40

test-distributed: $(STAMP)  ## the tests that train in two processes
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m distributed --timeout 300

test-gpu: $(STAMP)  ## the tests that need a CUDA device
	$(BIN)/python -m pytest -m gpu --timeout 900

gpu-check: $(STAMP)  ## predictions, bits and peers on the GPU (else the CPU); ARGS="--help"
	$(BIN)/python -m benchmarks.device_check $(ARGS)

lint: $(STAMP)  ## ruff and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(STAMP)  ## let ruff format and sort imports
	$(BIN)/ruff check --select I --fix .
	$(BIN)/ruff format .

bench-solvers: $(STAMP)  ## solvers side by side, some ten minutes; ARGS="--help" says more
	$(BIN)/python -m benchmarks.solvers compare $(ARGS)

bench-growth: $(STAMP)  ## how solving grows with the number of layers
	$(BIN)/python -m benchmarks.solvers growth $(ARGS)

bench-scale: $(STAMP)  ## plan LLaMA-70B and GPT-3 without weights, then twelve-layer models; half an hour
	$(BIN)/python -m benchmarks.scale deep $(ARGS)
	$(BIN)/python -m benchmarks.scale suite

bench-guides: $(STAMP)  ## what fits in 8, 20 and 32 GB, and at which cost; ARGS="--help" says more
	$(BIN)/python -m benchmarks.guides $(ARGS)

bench-compare: $(STAMP)  ## every strategy and peer on nine models, some hours; ARGS="--help" says more
	$(BIN)/python -m benchmarks.compare $(ARGS)

bench-record: $(STAMP)  ## the comparisons of docs/record anew, some two hours on an idle machine
	$(BIN)/python -m benchmarks.compare --cost-model profile --num-budgets 4 --repeats 4 --limit-s 12 \
		--without checkmate_milp --without checkmate_lp_rounding --without moccasin \
		--peer checkpoint_per_block --peer checkpoint_sqrt --peer gradient_checkpointing_enable \
		--peer sac_save_matmuls --peer compile_budget_0.4 --out build/record $(ARGS)

bench-literature: $(STAMP)  ## chains, Checkmate's experiments, half of the memory; half an hour
	$(BIN)/python -m benchmarks.literature chains
	$(BIN)/python -m benchmarks.literature checkmate
	$(BIN)/python -m benchmarks.literature half

bench-small: $(STAMP)  ## planned steps of the smallest kernels beside eager, a minute
	OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.small_kernels

bench-lengths: $(STAMP)  ## batches of changing length: one plan beside eager and per-layer, a quarter of an hour
	OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.lengths $(ARGS)

sweep-operators: $(STAMP)  ## plan and run every operator and module of PyTorch's database; an hour
	$(BIN)/python -m benchmarks.sweeps.operators --record docs/sweeps/operators.md $(ARGS)

sweep-models: $(STAMP)  ## plan every architecture at hand beside eager, half an hour; ARGS="--help"
	OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.sweeps.models --table docs/sweeps/models.md $(ARGS)

sweep-loops: $(STAMP)  ## random training loops, planned beside eager, half an hour; ARGS="--help"
	OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.sweeps.loops --table docs/sweeps/loops.md $(ARGS)

calibrate: $(STAMP)  ## fit the roofline to the device at hand, some minutes; ARGS="--help" says more
	$(BIN)/python -m benchmarks.calibrate $(ARGS)

notebooks: $(STAMP)  ## execute the notebooks from clean and write their outputs, some minutes
	$(BIN)/python -m notebooks $(ARGS)

wheel: $(STAMP)  ## build the wheel into dist/
	rm -rf build/lib build/bdist.* dist
	$(BIN)/python -m pip wheel --quiet --no-deps --no-build-isolation --wheel-dir dist .

# The wheel is installed alone into a venv of its own; its dependencies are lent by .venv
# through a .pth file. Directories added that way have no .pth of their own read, so the
# editable install of .venv stays out.
test-wheel: wheel  ## install the built wheel in a clean venv and use it
	rm -rf $(WHEEL_VENV)
	$(BIN)/python -m venv $(WHEEL_VENV)
	$(WHEEL_VENV)/bin/python -m pip install --quiet --no-deps dist/remat_planner-*.whl
	$(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))' > \
		"$$($(WHEEL_VENV)/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/dependencies.pth"
	wheel_bin="$$PWD/$(WHEEL_VENV)/bin" smoke="$$PWD/tests/wheel_smoke.py" && \
		cd "$$(mktemp -d)" && "$$wheel_bin/python" -P "$$smoke" && "$$wheel_bin/remat" --help > /dev/null

clean:  ## remove what was built; .venv stays
	rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -not -path './$(VENV)/*' -prune -exec rm -rf {} +
