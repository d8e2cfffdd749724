# `make demo` and `make test` set up everything that they need, in .venv, and then run. PYTHON=... picks the interpreter.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
SOURCES := setup.py pyproject.toml constraints.txt $(shell find csrc -name '*.c*' -o -name '*.h')

.PHONY: demo figure test lint compile-check bench bench-env build clean

demo: build
	$(BIN)/rlhf demo --output runs/demo

figure: build
	$(BIN)/rlhf figure --output runs/figure

test: build lint
	$(BIN)/python -m pytest

lint: build
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

# Every GPU kernel compiled for real chips, on a machine that has none: registers, spills, stack frames.
compile-check: build
	$(BIN)/python -m benchmarks.compile_check

bench: bench-env
	$(BIN)/python -m benchmarks

# The peers that the benchmarks compare with; they change no version of the packages above.
bench-env: build
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --constraint benchmarks/constraints-peers.txt \
		trl liger-kernel cut-cross-entropy

build: $(VENV)/.built

$(VENV)/.built: $(SOURCES)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[engine,dev]'
	touch $@

clean:
	rm -rf $(VENV) build runs *.egg-info rlhf_kernels/*.so
