# Every target sets up what it needs; `make help` lists them.
.DEFAULT_GOAL := help
SHELL := /bin/bash
PYTHON ?= python3
BIN := .venv/bin
STAMP := .venv/.installed
BENCH_BIN := .venv-bench/bin
BENCH_STAMP := .venv-bench/.installed
CLIENTS_STAMP := .venv-kserve/.installed
PEERS := litserve bentoml mlserver
PEERS_STAMP := .venv-mlserver/.installed
NAME ?= quickstart
# Workers import torch in every process: without bytecode that costs 10 s each instead of 3.5.
unexport PYTHONDONTWRITEBYTECODE
export SCALE

.PHONY: help install quickstart test test-all test-gpu fmt lint types imports check bench chromium fashion-mnist clients peers stubs docs clean

help: ## Show this list
	@grep -E '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-12s %s\n", $$1, $$2}'

install: $(STAMP) ## Make .venv with everything

$(STAMP): requirements.lock pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 11) else "PU-Ray needs Python 3.11 or later, got " + sys.version.split()[0] + "; try: make PYTHON=python3.12 install")'
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv
	@echo "installing into .venv (several GB the first time: torch brings its CUDA libraries)"
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.lock
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --editable .
	@touch $@

quickstart: $(STAMP) ## Run the whole chain on real images on this machine (2 to 4 minutes, no network)
	@$(BIN)/pu-ray demo demo
	@$(BIN)/pu-ray run cluster/jobs/smoke.yaml

test: $(STAMP) $(CLIENTS_STAMP) ## Run the tests
	@$(BIN)/python -m pytest -m "not slow"

test-all: $(STAMP) $(CLIENTS_STAMP) ## Run the tests, the slow ones too
	@$(BIN)/python -m pytest

test-gpu: $(STAMP) ## Run the tests that need a GPU
	@$(BIN)/python -m pytest tests/integration/test_gpu.py

fmt: $(STAMP) ## Format the code
	@$(BIN)/ruff format .
	@$(BIN)/ruff check --fix .

lint: $(STAMP) ## Check format and style
	@$(BIN)/ruff format --check .
	@$(BIN)/ruff check .

types: $(STAMP) ## Check types
	@$(BIN)/mypy

imports: $(STAMP) ## Check who may import whom
	@$(BIN)/lint-imports --no-logo

check: lint types imports test ## Everything CI runs

# The competitors' dependencies must not disturb ours: they get a place of their own, which sees .venv behind it.
$(BENCH_STAMP): $(STAMP)
	@test -x $(BENCH_BIN)/python || $(BIN)/python -m venv .venv-bench
	@$(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))' \
		> "$$($(BENCH_BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/project.pth"
	@$(BIN)/python -c 'import tomllib; print("\n".join(tomllib.load(open("pyproject.toml", "rb"))["project"]["optional-dependencies"]["bench"]))' \
		> .venv-bench/requirements.txt
	@$(BENCH_BIN)/python -m pip install --quiet --disable-pip-version-check -r .venv-bench/requirements.txt
	@touch $@

# Clients of the open protocol that are not ours; each has dependencies that clash with the other's, and with ours.
$(CLIENTS_STAMP): tests/integration/clients/requirements-triton.txt tests/integration/clients/requirements-kserve.txt
	@for client in triton kserve; do \
		test -x .venv-$$client/bin/python || $(PYTHON) -m venv .venv-$$client || exit 1; \
		.venv-$$client/bin/python -m pip install --quiet --disable-pip-version-check \
			-r tests/integration/clients/requirements-$$client.txt || exit 1; \
	done
	@touch $@

clients: $(CLIENTS_STAMP) ## Install tritonclient and KServe's client for the conformity tests

# Servers to compare ours with, each in a place of its own (6 GB, because of torch), and the load generator. Torch,
# torchvision and Pillow are those of ours, so that the network and the decoder are the same.
$(PEERS_STAMP): requirements.lock $(PEERS:%=tests/benchmarks/peers/requirements-%.txt)
	@command -v wrk > /dev/null || { apt-get update -q && apt-get install -y -q --no-install-recommends wrk; }
	@for peer in $(PEERS); do \
		test -x .venv-$$peer/bin/python || $(PYTHON) -m venv .venv-$$peer || exit 1; \
		.venv-$$peer/bin/python -m pip install --quiet --disable-pip-version-check \
			-r tests/benchmarks/peers/requirements-$$peer.txt \
			$$(grep -E '^(torch|torchvision|pillow)==' requirements.lock) || exit 1; \
	done
	@touch $@

peers: $(PEERS_STAMP) ## Install LitServe, BentoML, MLServer and wrk for bench NAME=serving (17 GB)

bench: $(STAMP) $(if $(filter mining,$(NAME)),$(BENCH_STAMP)) $(if $(filter serving,$(NAME)),$(PEERS_STAMP)) ## Measure NAME=quickstart (default), mining, quality (SCALE=small), distill, scaling, serving or gpu anew, ARGS="--help"; print its table
	@$(if $(filter mining,$(NAME)),$(BENCH_BIN),$(BIN))/python -m tests.benchmarks.$(NAME) $(ARGS)

chromium: ## Install Debian's browser for the tests of the server's page (else they are skipped)
	apt-get update -q && apt-get install -y -q --no-install-recommends chromium

fashion-mnist: ## Install Debian's package with the images of the quality benchmark (else torchvision downloads them)
	apt-get install -y -q dataset-fashion-mnist

# Of an older generator on purpose: what it writes runs with two major versions of protobuf.
stubs: $(STAMP) ## Write serving/inference_pb2*.py anew from serving/inference.proto
	@test -x .venv-stubs/bin/python || $(BIN)/python -m venv .venv-stubs
	@.venv-stubs/bin/python -m pip install --quiet --disable-pip-version-check grpcio-tools==1.76.0
	@.venv-stubs/bin/python -m grpc_tools.protoc -I. --python_out=. --grpc_python_out=. --pyi_out=. serving/inference.proto

docs: $(STAMP) ## Write the pages that are made from the code: errors, job file, command line
	@$(BIN)/python -m tests.docs.pages

clean: ## Remove the demo and its runs, keep .venv
	@rm -rf demo runs
