# Every target works from a fresh clone: the first one that needs it makes .venv from constraints.txt.
#   make PYTHON=python3.12 demo      another interpreter
#   make PIP_FLAGS=... demo          further options for pip, e.g. another package index

PYTHON ?= python3
PIP_FLAGS ?=
BIN := .venv/bin
# A compiler at work in most tests: two processes take half the time of one.
PARALLEL := -n auto --maxprocesses 4 --dist worksteal

.PHONY: help demo test test-keras lint format bench soak peers clean distclean
.DEFAULT_GOAL := help

help: ## show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-10s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

demo: .venv/.installed ## reproduce the small table of the paper (minutes on two cores); repeat it to go on
	$(BIN)/alrc sweep table1 --preset quick

test: .venv/.installed ## run the default test tier, with the frameworks that are installed (minutes)
	$(BIN)/python -m pytest $(PARALLEL)

test-keras: .venv/.installed .venv-tensorflow/.installed ## run the Keras tests on its three backends, tensorflow's in an environment of its own
	KERAS_BACKEND=torch $(BIN)/python -m pytest $(PARALLEL) tests/keras src/alrc/keras
	KERAS_BACKEND=jax $(BIN)/python -m pytest $(PARALLEL) tests/keras src/alrc/keras
	KERAS_BACKEND=tensorflow .venv-tensorflow/bin/python -m pytest $(PARALLEL) tests/keras src/alrc/keras

lint: .venv/.installed ## check style, formatting and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

format: .venv/.installed ## repair what ruff can repair
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: .venv/.installed ## measure the overhead and the cost of a step, with the hardware in the header
	$(BIN)/python benchmarks/loss_limiting.py
	$(BIN)/python benchmarks/gradient_clipping.py
	$(BIN)/python benchmarks/step_guard.py
	$(BIN)/python benchmarks/experiment_step.py
	$(BIN)/python benchmarks/replicas.py --rounds 5 --widths 16
	$(BIN)/python benchmarks/roofline.py
	$(BIN)/python benchmarks/partial_stem_step.py
	$(BIN)/python benchmarks/jax_transforms.py
	KERAS_BACKEND=jax $(BIN)/python benchmarks/keras_layer.py
	KERAS_BACKEND=torch $(BIN)/python benchmarks/keras_layer.py

soak: .venv/.installed ## kill executor, workers and driver 50 times each way, and measure sweeps of many runs (half an hour)
	$(BIN)/python benchmarks/soak.py
	$(BIN)/python benchmarks/many_runs.py

peers: .venv/.installed ## ask alrc and its peers the eight conformance questions and print the table (minutes)
	$(BIN)/python benchmarks/peers.py

clean: ## remove caches and built packages; results stay
	rm -rf build dist .pytest_cache .ruff_cache .hypothesis .coverage
	find src tests benchmarks -name __pycache__ -type d -prune -exec rm -rf {} +

distclean: clean ## remove .venv and .venv-tensorflow too
	rm -rf .venv .venv-tensorflow

.venv/.installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
		echo "alrc needs Python 3.11 or newer, but '$(PYTHON)' is $$($(PYTHON) --version 2>&1 | tail -n 1)." \
			"Name another interpreter: make PYTHON=python3.12 $(MAKECMDGOALS)" >&2; exit 1; }
	@echo "Installing alrc and its tested dependencies into .venv; this takes a few minutes, once."
	@$(PYTHON) -m venv .venv
	@$(BIN)/python -m pip install -qq --disable-pip-version-check $(PIP_FLAGS) -c constraints.txt -e '.[dev]'
	@touch $@

.venv-tensorflow/.installed: pyproject.toml constraints.txt
	@echo "Installing alrc and tensorflow into .venv-tensorflow, once."
	@$(PYTHON) -m venv .venv-tensorflow
	@.venv-tensorflow/bin/python -m pip install -qq --disable-pip-version-check $(PIP_FLAGS) -c constraints.txt \
		-e '.[keras]' tensorflow-cpu pytest pytest-xdist hypothesis
	@touch $@
