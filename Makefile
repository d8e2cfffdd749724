# `make demo` and `make test` set up everything that they need, in .venv, and then run. PYTHON=... picks the interpreter.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
SOURCES := setup.py pyproject.toml constraints.txt $(shell find csrc -name '*.c*' -o -name '*.h')

PEERS := .venv-peers

.PHONY: demo figure test test-peers lint compile-check bench bench-env build clean

demo: build
	$(BIN)/rlhf demo --output runs/demo --overwrite

figure: build
	$(BIN)/rlhf figure --output runs/figure

# A process for every core, up to eight, and one thread in each. Modules start in the order of tests/conftest.py, slowest first.
test: build lint
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses auto --maxprocesses 8 --dist loadscope --no-loadscope-reorder

lint: build
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright
	PATH=$(BIN):$$PATH PYTHONPATH=. $(BIN)/pyright --verifytypes rlhf_kernels --ignoreexternal

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

# The adapters against the originals, in an environment of their own: trl 1.12.0 beside verl and OpenRLHF, then trl's current
# release. DEEPSPEED_CHAT=... names a folder with DeepSpeed-Chat, which is in no package index; without it, its cases are skipped.
test-peers: $(PEERS)/.built
	$(if $(DEEPSPEED_CHAT),ln -sfn $(abspath $(DEEPSPEED_CHAT)) $(PEERS)/sources/DeepSpeed-Chat)
	$(PEERS)/bin/python -m pytest tests/integrations/peers
	PYTHONPATH=$(PEERS)/sources/trl-current $(PEERS)/bin/python -m pytest tests/integrations/peers/test_trl_grpo.py
	$(PEERS)/bin/python -m benchmarks.peer_agreement

# What verl and OpenRLHF say they require are older releases and GPU libraries that the compared functions have no use for.
$(PEERS)/.built: $(SOURCES) benchmarks/constraints-peers.txt
	test -x $(PEERS)/bin/python || $(PYTHON) -m venv $(PEERS)
	$(PEERS)/bin/python -m pip install --quiet --constraint constraints.txt --constraint benchmarks/constraints-peers.txt \
		--editable . pytest transformers trl liger-kernel cut-cross-entropy peft \
		ray tensordict omegaconf orjson codetiming hydra-core
	$(PEERS)/bin/python -m pip install --quiet --no-deps --constraint benchmarks/constraints-peers.txt verl openrlhf
	$(PEERS)/bin/python -m pip install --quiet --no-deps --upgrade --target $(PEERS)/sources/openrlhf-0.11.0 openrlhf==0.11.0
	$(PEERS)/bin/python -m pip install --quiet --no-deps --upgrade --target $(PEERS)/sources/openrlhf-0.7.5 openrlhf==0.7.5
	$(PEERS)/bin/python -m pip install --quiet --no-deps --upgrade --target $(PEERS)/sources/trl-0.11.4 trl==0.11.4
	$(PEERS)/bin/python -m pip install --quiet --no-deps --upgrade --target $(PEERS)/sources/trl-current trl==1.16.0
	touch $@

.PHONY: docs
docs: build ; $(BIN)/python -m pip install --quiet mkdocs-material 'mkdocstrings[python]' latex2mathml && $(BIN)/python -m mkdocs build --strict

clean:
	rm -rf $(VENV) $(PEERS) build runs *.egg-info rlhf_kernels/*.so
