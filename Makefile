# Requires Python 3.11 or newer and make. `make help` lists the targets.
PYTHON ?= python3
VENV := .venv
RUN := $(VENV)/bin/python
UV_VERSION := 0.13.9
# Everything that starts Ray has a time limit, because a pipeline without resources would wait forever.
LIMIT := timeout --kill-after=30

.DEFAULT_GOAL := help
.PHONY: help setup demo test test-unit test-slow test-multinode test-gpu gpu mutants checks docs bench lock clean

help:  ## list the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /\t/' | expand -t 18

# Compiled bytecode halves the start-up time of every process that imports torch, and Ray starts many of them.
$(VENV)/.installed: pyproject.toml requirements.lock
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/pip install --quiet uv==$(UV_VERSION)
	$(VENV)/bin/uv pip install --quiet --compile-bytecode --python $(RUN) \
		-r pyproject.toml --extra dev --constraints requirements.lock
	touch $@

setup: $(VENV)/.installed  ## create the environment in .venv

demo: setup  ## label photographs and train on digits, with an S3 store on this machine
	$(LIMIT) 900 $(RUN) -m cluster.local.demo

test: test-unit  ## run the fast tests
	$(LIMIT) 1500 $(RUN) -m pytest -m "not unit and not slow and not gpu and not multinode"

test-unit: setup  ## run the tests that need neither Ray nor an object store, in two processes
	$(LIMIT) 300 $(RUN) -m pytest -m unit --numprocesses 2 --dist loadfile

test-slow: setup  ## run the slow tests: all five models, all combinations of stores, job submission
	$(LIMIT) 3300 $(RUN) -m pytest -m "slow and not gpu and not multinode"

test-multinode: setup  ## run jobs on five hosts in network namespaces, with faults (needs root on Linux)
	command -v ip > /dev/null || (apt-get update && apt-get install --yes --no-install-recommends iproute2)
	$(LIMIT) 3000 $(RUN) -m pytest -m "multinode and not slow"

test-gpu: setup  ## run the tests that need a GPU
	$(LIMIT) 1800 $(RUN) -m pytest -m gpu || [ $$? -eq 5 ]

# Runs in the Python of the GPU host, which has torch, timm and Ray already.
GPU_PYTHON ?= python3
gpu:  ## measure everything that needs a GPU, within eight minutes; results in gpu-results
	$(GPU_PYTHON) -m benchmarks.gpu --output gpu-results

mutants: setup  ## change the code in thousands of places, and list the changes that no fast test notices; takes hours
	$(VENV)/bin/uv pip install --quiet --compile-bytecode --python $(RUN) \
		-r pyproject.toml --extra mutants --constraints requirements.lock
	$(VENV)/bin/mutmut run
	$(VENV)/bin/mutmut results

checks: setup  ## check format, lint and types
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/ruff check .
	$(VENV)/bin/mypy

docs: setup  ## build the documentation site, in docs/_build
	$(VENV)/bin/uv pip install --quiet --compile-bytecode --python $(RUN) \
		-r pyproject.toml --extra docs --constraints requirements.lock
	$(VENV)/bin/sphinx-build --quiet -W --keep-going docs docs/_build

bench: setup  ## run the benchmarks, side by side with timm, Ray's documented pattern and Daft
	$(VENV)/bin/uv pip install --quiet --compile-bytecode --python $(RUN) \
		-r pyproject.toml --extra bench --constraints requirements.lock
	# Daft pins an older pyarrow than requirements.lock, but works with the locked one.
	$(VENV)/bin/uv pip install --quiet --python $(RUN) --no-deps daft==0.7.26
	$(LIMIT) 1800 $(RUN) -m benchmarks.decode
	$(LIMIT) 1800 $(RUN) -m benchmarks.forward
	$(LIMIT) 3600 $(RUN) -m benchmarks.whole_run --programs ray daft timm timm-channels-last timm-compiled ecaray ecaray-fast
	$(LIMIT) 3600 $(RUN) -m benchmarks.agreement
	$(LIMIT) 1800 $(RUN) -m benchmarks.training
	$(LIMIT) 1800 $(RUN) -m benchmarks.loader
	$(LIMIT) 600 $(RUN) -m benchmarks.fetch
	$(LIMIT) 900 $(RUN) -m benchmarks.resume
	$(LIMIT) 900 $(RUN) -m benchmarks.listing
	$(LIMIT) 900 $(RUN) -m benchmarks.scale
	$(LIMIT) 600 $(RUN) -m benchmarks.sizing
	$(LIMIT) 1800 $(RUN) -m benchmarks.chaos
	$(LIMIT) 14400 $(RUN) -m benchmarks.takeover

lock: setup  ## update requirements.lock
	$(VENV)/bin/uv pip compile pyproject.toml --all-extras --python-version 3.11 --no-header --quiet \
		--no-emit-index-url --no-emit-find-links --constraints requirements.constraints -o requirements.lock

clean:  ## remove the environment and caches
	rm -rf $(VENV) .demo docs/_build gpu-results mutants .mypy_cache .pytest_cache .ruff_cache
