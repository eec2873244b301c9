# The commands of development. The environment is .venv; PYTHON chooses the interpreter that makes it.
PYTHON ?= python3
VENV ?= .venv
FAISS ?= cpu
PROCESSES ?= 2
PYTEST = $(BIN)/python -m pytest -q --numprocesses $(PROCESSES) --dist loadfile --no-loadscope-reorder
BIN = $(VENV)/bin
# uv, where it is installed, takes seconds where pip takes minutes; it does not read PIP_FIND_LINKS itself.
UV = UV_FIND_LINKS='$(PIP_FIND_LINKS)' uv
INSTALL = $(if $(shell command -v uv),$(UV) pip install --quiet --python $(BIN)/python,\
  $(BIN)/python -m pip install --quiet --disable-pip-version-check)
READY = $(VENV)/.ready

.PHONY: help demo screenshots test test-all test-oldest test-long test-faults test-cluster test-cluster-fast test-gpu check format bench wheel lock audit clean

help: ## this list
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*## /\t/'

$(READY): pyproject.toml setup.py constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(INSTALL) -c constraints.txt -e '.[$(FAISS),dev]'
	touch $(READY)

demo: $(READY) ## the whole pipeline on a data set that the program generates: table, report and model in runs/demo
	$(BIN)/python launch/full_pipeline.py --config configs/demo.yaml --out runs/demo

screenshots: $(READY) ## docs/report.png of the report in runs/demo, which make demo makes; needs chromium (tests/install_chromium.sh)
	$(BIN)/python -m tests.screenshots --run runs/demo --out docs/report.png

MARKS ?= not slow and not long and not cluster
test: $(READY) ## every module and a whole pipeline with kills, in minutes on two cores; needs no GPU and no cluster
	$(PYTEST) -m '$(MARKS)'

test-all: $(READY) ## the rest of what a push runs as far as its time allows, and needs no cluster
	$(PYTEST) -m 'slow and not long and not cluster'

test-long: $(READY) ## tests that take too long for every push: jobs killed at random steps by ten seeds, local clusters, five ranks, ...
	$(BIN)/python -m pytest -q -m 'long and not cluster'

OLDEST = .venv-oldest
OLDEST_TESTS = tests/models tests/training tests/search tests/kmeans tests/knn tests/stages tests/retrieval tests/data \
  tests/distributed tests/inputs tests/make_shards
test-oldest: ## tests of images, models, training, k-means, k-NN and stages with the oldest versions that pyproject.toml allows; needs uv and 7 GB
	$(PYTHON) -m venv $(OLDEST)
	$(UV) pip install --quiet --python $(OLDEST)/bin/python --resolution lowest-direct -e '.[$(FAISS),parquet,heif,benchmarks]' \
	  'pytest>=8' 'pytest-timeout>=2.3' 'hypothesis>=6.100'
	$(OLDEST)/bin/python -m pytest -q -m '$(MARKS)' $(OLDEST_TESTS)

FAULT_TRIALS ?= 300
FAULT_MINUTES ?= 600
FAULT_RUNS ?= 1
FAULT_STOP_S ?= 120
FAULT_OUT ?= runs/faults
test-faults: $(READY) ## faults at seeded points of small runs, with a table in runs/faults; FAULT_TRIALS=300, FAULT_MINUTES=..., FAULT_RUNS=2 at a time
	$(BIN)/python -m tests.faults.matrix --out $(FAULT_OUT) --trials $(FAULT_TRIALS) --minutes $(FAULT_MINUTES) \
	  --side-by-side $(FAULT_RUNS) --stop-s $(FAULT_STOP_S)

test-cluster: $(READY) ## tests on several machines in namespaces, about 40 minutes on 2 cores; needs root, and Slurm: tests/cluster/install_slurm.sh
	$(BIN)/python -m pytest -q -m cluster tests/cluster

test-cluster-fast: $(READY) ## those of them that are run on every push
	$(BIN)/python -m pytest -q -m 'cluster and not long' tests/cluster

GPU_TESTS = tests/gpu_check tests/benchmarks/test_fuse.py tests/data/test_device_batches.py tests/knn/test_exact.py
test-gpu: ## tests that need a GPU, by PYTHON, which has what docs/gpu.md lists and pytest; skipped, with the reason, without one
	$(PYTHON) -m pytest -q -m gpu $(GPU_TESTS)

check: $(READY) ## lint, format and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(READY) ## formats and sorts imports
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(READY) ## reading against webdataset, k-means against faiss (long; the machine should do nothing else)
	$(BIN)/python launch/bench.py data
	$(BIN)/python launch/bench.py kmeans

wheel: $(READY) ## a wheel in wheels/
	$(BIN)/python -m pip wheel --quiet --no-deps --wheel-dir wheels .

lock: ## requirements-lock.txt again, from pyproject.toml and constraints.txt; needs uv, and the CPU build of torch (CONTRIBUTING.md)
	uv pip compile --quiet pyproject.toml --extra cpu --extra dev -c constraints.txt --generate-hashes --no-annotate \
	  --python-version 3.11 --python-platform x86_64-manylinux_2_28 --custom-compile-command 'make lock' -o requirements-lock.txt

audit: ## known vulnerabilities of what requirements-lock.txt names, by pip-audit; SKIPPED where no database answers
	PYTHON=$(PYTHON) tests/audit.sh

clean: ## removes the environment and build leftovers; runs/ stays
	rm -rf $(VENV) $(OLDEST) build wheels *.egg-info
