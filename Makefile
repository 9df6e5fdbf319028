# make help lists the targets. Every target that needs it makes .venv, installs the pinned requirements and
# builds the extensions first; a second call finds all that done.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check -qq
SOURCES := setup.py pyproject.toml $(wildcard csrc/*.* csrc/*/*.* csrc/*/*/*.*)

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.NOTPARALLEL:
.PHONY: help build demo test bench lint docs gpu clean

help: ## show this list
	@awk -F ':.*## ' '/^[a-z]+:.*## / {printf "  make %-7s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

build: $(VENV)/.built ## make .venv and compile the extensions in place

demo: $(VENV)/.demo $(VENV)/.built ## forget a module on the CPU, with the kernels and without (ARGS="--module json")
	$(BIN)/python examples/forget_a_module.py $(ARGS)

test: $(VENV)/.peers $(VENV)/.built ## the test suite, and the documentation's examples (ARGS="-k surgery")
	OMP_WAIT_POLICY=passive $(BIN)/python -m pytest -n 2 --dist loadfile $(ARGS)

bench: $(VENV)/.bench $(VENV)/.built ## every benchmark against its peers (ARGS="surgery --threads 1")
	$(BIN)/python -m benchmarks run --peers $(ARGS)

lint: $(VENV)/.test ## ruff and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

docs: $(VENV)/.test $(VENV)/.built ## write the README's tables, then check examples and links
	$(BIN)/python docs/operator_table.py --write
	PYTHONPATH=. $(BIN)/python docs/results_table.py --write
	$(BIN)/python -m pytest -q tests/packaging/test_docs.py

# A GPU machine brings its own torch and Triton, so this target uses $(PYTHON) as it is and makes no .venv.
gpu: ## on a GPU machine with its own torch: build, test, benchmark, write results (ARGS="surgery --resume")
	$(PYTHON) -m benchmarks.gpu $(ARGS)

clean: ## remove .venv and everything that was built
	rm -rf $(VENV) build dist out *.egg-info .pytest_cache .ruff_cache .mypy_cache .hypothesis
	rm -f unlearn_kernels/*.so unlearn_kernels/_build_info.json
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

# torch is installed first and alone: whatever asks for it later is content with the build that is there.
$(VENV)/.torch: requirements/torch.txt | $(BIN)/python
	$(PIP) install -r requirements/torch.txt
	@touch $@

$(VENV)/.%: requirements/%.txt requirements/build.txt requirements/demo.txt $(VENV)/.torch
	$(PIP) install -r $<
	@touch $@

$(VENV)/.peers: requirements/peers.txt $(VENV)/.test
	$(PIP) install --no-deps -r $<
	@touch $@

# The stamp bears the time at which the build began: what was saved meanwhile is built by the next call.
$(VENV)/.built: $(SOURCES) $(VENV)/.build
	@touch $@.begun
	$(PIP) install --no-build-isolation --no-deps -e .
	@mv $@.begun $@
