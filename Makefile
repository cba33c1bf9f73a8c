# make train [NPROC=4] [ARGS="train.epochs=2 ..."]    install, download the data, train
# make check                                          the inner loop, 3 minutes on 2 cores: linters, types, fast unit tests
# make test                                           install, download the data, all tests except cluster and browser
# make test-lowest                                    the unit tests with the lowest versions of all packages, in .venv-lowest
# make prove-exact                                    compare the bits of runs on 1, 2, 4, 8 ranks, and after kills
# make chaos [ARGS="--kills 200"]                     kill ranks and agents at random; check that nothing is lost
# make chaos-store [KILLS=20]                         as root: the same with runs in S3, on two hosts without a shared disk
# make fuzz [TIMES=30]                                random settings, files and environments, TIMES as many as usual
# make bench [ARGS="--only reduction"]                measure; write benchmarks/RESULTS.md
# make gpu-report [ARGS="--only recipe bits"]         on one GPU, 11 minutes: measure and check; write benchmarks/GPU.md
# make gpu-bundle                                     fetch what gpu-report needs on a machine without a network
# make test-cluster                                   as root on Debian: install SLURM, test the batch scripts on it
# make test-browser                                   as root on Debian: install Chromium and npm, test the pages and the site
# make test-container                                 as root on Debian: install buildah, build launch/Containerfile, train in it
# make lint, format, coverage                         linters and types; format the code; report untested lines
# make docs                                           build the documentation site in build/docs; warnings are errors
# make data, clean                                    download Fashion-MNIST; remove the environment
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
LOWEST := .venv-lowest
NODE   := .node
ARGS   ?=
# Processes on this machine: one per GPU, or 2 without a GPU.
NPROC  ?= $(shell $(BIN)/python -c 'import torch; print(torch.cuda.device_count() or 2)')

.PHONY: help train data check test test-lowest test-cluster test-browser test-container chaos chaos-store coverage
.PHONY: fuzz bench gpu-report gpu-bundle prove-exact lint format docs clean
.DELETE_ON_ERROR:

help:
	@sed -n '/^PYTHON/q; s/^# //p' Makefile

train: data
	OMP_NUM_THREADS=$${OMP_NUM_THREADS:-1} $(BIN)/python -m distlenet.launch --standalone --nproc-per-node=$(NPROC) -m distlenet.train run.report=always $(ARGS)

data: $(VENV)/.installed
	@$(BIN)/python -m distlenet.data $(ARGS)

check: $(VENV)/.installed-dev lint
	$(BIN)/pytest --quiet --numprocesses=2 --dist=worksteal -m "not slow" tests/unit

test: $(VENV)/.installed-dev lint
	@$(BIN)/python -m distlenet.data
	$(BIN)/pytest --numprocesses=2 --dist=worksteal tests/unit
	$(BIN)/pytest --numprocesses=3 --dist=worksteal tests/ranks
	$(BIN)/pytest --numprocesses=2 --dist=worksteal tests/fake_cuda

# Of the slow tests, those that call other packages in ways that no fast test does. The others start processes, measure
# or repeat what the fast tests call: kills, downloads, builds, memory, fuzz. The site needs the extra docs.
SLOW_LOWEST := $(patsubst %,tests/unit/test_%.py,api_page commands export image_sources mlflow predict prometheus report serve sinks storage storage_loss)
test-lowest: $(LOWEST)/.installed
	DISTLENET_VERSIONS=lowest $(LOWEST)/bin/pytest --numprocesses=2 --dist=worksteal -m "not slow" tests/unit \
	  --ignore=tests/unit/test_site.py
	DISTLENET_VERSIONS=lowest $(LOWEST)/bin/pytest --numprocesses=2 --dist=worksteal -m slow $(SLOW_LOWEST)

chaos: $(VENV)/.installed
	@$(BIN)/python benchmarks/chaos.py $(ARGS)

KILLS ?= 20
chaos-store: $(VENV)/.installed-dev
	STORE_KILLS=$(KILLS) DISTLENET_SLURM=required $(BIN)/pytest -s --timeout=3600 tests/cluster/test_object_store.py

# Report the lines that no test runs; without a GPU, those for a GPU are among them.
coverage: $(VENV)/.installed-dev
	$(BIN)/coverage erase
	$(BIN)/coverage run -m pytest --numprocesses=2 tests/unit
	$(BIN)/coverage run -m pytest --numprocesses=2 --dist=worksteal tests/ranks
	$(BIN)/coverage combine --quiet
	$(BIN)/coverage report

TIMES ?= 30
fuzz: $(VENV)/.installed-dev
	FUZZ=$(TIMES) $(BIN)/pytest --timeout=7200 --numprocesses=2 tests/unit/test_fuzz.py

SLURM := slurmctld slurmd slurm-client munge iproute2
test-cluster: $(VENV)/.installed-dev
	@command -v slurmctld > /dev/null || \
	  { apt-get update -qq && apt-get install -y -qq --no-install-recommends $(SLURM) > /dev/null; }
	DISTLENET_SLURM=required $(BIN)/pytest --numprocesses=2 --dist=worksteal --timeout=600 tests/cluster

test-browser: $(VENV)/.installed-dev $(NODE)/.installed
	@command -v chromium > /dev/null || \
	  { apt-get update -qq && apt-get install -y -qq --no-install-recommends chromium > /dev/null; }
	DISTLENET_BROWSER=required $(BIN)/pytest tests/browser

# ONNX Runtime Web, which the prediction page without a server runs; axe-core, which checks that pages are accessible.
$(NODE)/.installed: Makefile
	@command -v npm > /dev/null || { apt-get update -qq && apt-get install -y -qq --no-install-recommends npm > /dev/null; }
	npm install --silent --no-audit --no-fund --no-save --ignore-scripts --prefix $(NODE) onnxruntime-web@1.30.0 axe-core@4.14.1
	@touch $@

test-container: $(VENV)/.installed
	@{ command -v buildah && command -v debootstrap; } > /dev/null || \
	  { apt-get update -qq && apt-get install -y -qq --no-install-recommends buildah debootstrap > /dev/null; }
	tests/container/build.sh

PROOF := device=cpu distributed.reduction=exact data.name=digits data.augment=shift data.ledger=true optim.lr=0.1 \
  train.global_batch_size=64 distributed.virtual_shards=8
prove-exact: $(VENV)/.installed
	@$(BIN)/python -m distlenet.prove $(PROOF) --ranks 1 2 4 8 --steps 47 $(ARGS)

bench: $(VENV)/.installed-bench
	@$(BIN)/python benchmarks/bench.py $(ARGS)

gpu-report: $(VENV)/.installed-bench $(VENV)/.installed-dev
	@$(BIN)/python benchmarks/gpu_report.py $(ARGS)

# The packages that a machine with PyTorch and torchvision may lack, for its version of Python; see docs/benchmarks.md.
BUNDLE_PYTHON ?= 3.12
BUNDLE := omegaconf PyYAML rich markdown-it-py mdurl pygments filelock psutil pillow \
  pytest pytest-timeout pytest-xdist execnet iniconfig pluggy packaging
gpu-bundle: data
	$(BIN)/pip download --quiet --no-deps --only-binary=:all: --python-version $(BUNDLE_PYTHON) --implementation cp \
	  $(foreach glibc,28 27 17,--platform manylinux_2_$(glibc)_x86_64) --platform manylinux2014_x86_64 --dest .wheels $(BUNDLE)
	git describe --always --dirty --abbrev=12 > .wheels/COMMIT

lint: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/shellcheck --external-sources launch/*.sh slurm/*.sbatch slurm/*.sh

format: $(VENV)/.installed-dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: $(VENV)/.installed-docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --config-file docs/site/mkdocs.yml
	@echo "build/docs/index.html; with the search: python3 -m http.server --directory build/docs"

# When pyproject.toml is newer than a stamp, pip installs what has changed.
$(VENV)/.installed: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --editable '.[report]'
	@touch $@

$(VENV)/.installed-dev: pyproject.toml $(VENV)/.installed
	$(BIN)/pip install --quiet --editable '.[dev]'
	@touch $@

$(VENV)/.installed-bench: pyproject.toml $(VENV)/.installed
	$(BIN)/pip install --quiet --editable '.[bench]'
	@touch $@

$(VENV)/.installed-docs: pyproject.toml $(VENV)/.installed
	$(BIN)/pip install --quiet --editable '.[docs]'
	@touch $@

# pip cannot install the lowest versions that pyproject.toml allows; uv can. "--clear": nothing newer may remain.
$(LOWEST)/.installed: pyproject.toml
	$(PYTHON) -m venv --clear $(LOWEST)
	$(LOWEST)/bin/pip install --quiet uv
	$(LOWEST)/bin/uv pip install --quiet --compile-bytecode --python $(LOWEST) --resolution lowest-direct -r pyproject.toml --extra test
	$(LOWEST)/bin/uv pip install --quiet --python $(LOWEST) --no-deps --editable .
	@touch $@

clean:
	rm -rf $(VENV) $(LOWEST) $(NODE) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache
