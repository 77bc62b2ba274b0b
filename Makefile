# Two commands do everything on a fresh machine: `make search` and `make test`.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
PEERS := build/peers
# Arguments for the search, e.g. make search ARGS="--trials 40 --seed 1"
ARGS ?=

.PHONY: setup search test test-all lint bench clean

setup: $(READY)

$(READY): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable ".[dev]"
	touch $@

search: setup
	$(BIN)/edgewise search $(ARGS)

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

# Without an emulator the tests that need one say why they are skipped.
test: lint
	$(BIN)/python -m scripts.emulator || true
	$(BIN)/pytest -n 2 --dist worksteal

# Also what takes long: parity of every choice in every precision. Before a release.
test-all: lint
	$(BIN)/python -m scripts.emulator
	$(BIN)/pytest -n 2 --dist worksteal -m ""

# The runtimes we are compared with, in an environment of their own; llama.cpp is built for this processor.
$(PEERS)/.ready: benchmarks/peers.txt
	$(PYTHON) -m venv $(PEERS)
	CMAKE_ARGS=-DGGML_NATIVE=ON $(PEERS)/bin/python -m pip install --quiet --disable-pip-version-check \
	  --no-binary llama-cpp-python --requirement benchmarks/peers.txt
	touch $@

# e.g. make bench ARGS="--quick"
bench: setup $(PEERS)/.ready
	$(BIN)/python benchmarks/engine.py --peers-python $(PEERS)/bin/python $(ARGS)

clean:
	rm -rf $(VENV) build dist *.egg-info
