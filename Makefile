# `make demo` and `make test` create a virtual environment in .venv, install what they need, and run. PYTHON=... sets the
# interpreter. RLHF_CUDA=1 builds the extension with CUDA kernels and RLHF_CUDA=0 without them; by default it has them if torch
# is a CUDA build or an NVIDIA device is found.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
SOURCES := setup.py pyproject.toml constraints.txt $(shell find csrc -name '*.c*' -o -name '*.h')

PEERS := .venv-peers
PACKAGE := build/package
OLDEST := build/oldest
SANITIZED := build/sanitize

.PHONY: demo figure test soak test-oldest test-peers sanitize lint lint-text lint-types lint-public \
	compile-check bench bench-env build package docs clean

demo: build
	$(BIN)/rlhf demo --output runs/demo --overwrite

figure: build
	$(BIN)/rlhf figure --output runs/figure

# One process per core, at most eight, with one thread each. tests/conftest.py orders the modules, slowest first.
test: build lint
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses auto --maxprocesses 8 --dist loadscope --no-loadscope-reorder

# Load, save and sample with the oldest releases that pyproject.toml allows; the installed ones of the other packages stay.
test-oldest: $(OLDEST)/.built
	PYTHONPATH=$(OLDEST) OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/engine/model/test_pretrained.py \
		tests/engine/model/test_classifiers.py tests/engine/model/test_quantised.py tests/engine/rollout/test_decoders.py \
		tests/engine/recipes/test_trial.py tests/engine/ppo/test_longer_run.py

$(OLDEST)/.built: build constraints-oldest.txt
	rm -rf $(OLDEST)
	$(BIN)/python -m pip install --quiet --no-deps --target $(OLDEST) --requirement constraints-oldest.txt
	touch $@

# The kernels' CPU tests with AddressSanitizer and UndefinedBehaviorSanitizer (GCC): 10 minutes of compilation, then the tests.
sanitize: build
	RLHF_SANITIZE=1 RLHF_CUDA=0 $(BIN)/python setup.py --quiet build --force --build-base $(SANITIZED)/temp --build-lib $(SANITIZED)/lib
	$(BIN)/python -m tests.sanitizers

# Faults from seeds, kills, growth of memory and hostile input, in at most an hour; the report is docs/results/reliability.md.
# SOAK='--minutes 10 --only faults' shortens it.
soak: build
	$(BIN)/python -m tests.soak $(SOAK); status=$$?; $(BIN)/python -m docs.generate; exit $$status

lint: lint-text lint-types lint-public

lint-text: build
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/python -m tests.wording

lint-types: build
	$(BIN)/pyright

# The types of the public API are complete.
lint-public: build
	PATH=$(BIN):$$PATH PYTHONPATH=. $(BIN)/pyright --verifytypes rlhf_kernels --ignoreexternal

# Compile every GPU kernel for real chips, without a GPU: registers, spills, stack frames. ARCH='sm_90 gfx942' selects chips.
compile-check: build
	$(BIN)/python -m benchmarks.compile_check $(if $(ARCH),--arch $(ARCH))

bench: bench-env
	$(BIN)/python -m benchmarks

# The libraries that benchmarks compare with; they change no version of the packages above.
bench-env: build
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --constraint benchmarks/constraints-peers.txt \
		trl liger-kernel cut-cross-entropy

build: $(VENV)/.built

$(VENV)/.built: $(SOURCES)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[engine,dev]'
	$(BIN)/python -m rlhf_kernels.info --build
	touch $@

# Build the sdist and, from it, the wheel; install the wheel into an empty environment and check it there.
package: build
	rm -rf dist $(PACKAGE)
	$(BIN)/python -m pip install --quiet build
	RLHF_CUDA=0 $(BIN)/python -m build --outdir dist > build/package.log || { cat build/package.log; exit 1; }
	$(PYTHON) -m venv $(PACKAGE)
	$(PACKAGE)/bin/python -m pip install --quiet --constraint constraints.txt dist/*.whl
	$(PACKAGE)/bin/python -I tests/package_check.py

docs: build
	$(BIN)/python -m pip install --quiet --constraint constraints.txt 'mkdocs<2' mkdocs-material 'mkdocstrings[python]' latex2mathml
	$(BIN)/python -m docs.generate --check
	$(BIN)/python -m mkdocs build --strict --quiet

# Compare the adapters with the original trainers, in a separate environment: trl 1.12.0 with verl and OpenRLHF, then the
# current release of trl. Then run the unit tests of the peers with our functions swapped in. DEEPSPEED_CHAT=... is a folder
# with DeepSpeed-Chat, and PEER_CHECKOUTS=... a folder with checkouts of the peers whose tests are in no package index; without
# them, their cases are not run (`python -m benchmarks.peer_suites` prints the commands that make the checkouts).
test-peers: $(PEERS)/.built
	$(if $(DEEPSPEED_CHAT),ln -sfn $(abspath $(DEEPSPEED_CHAT)) $(PEERS)/sources/DeepSpeed-Chat)
	$(PEERS)/bin/python -m pytest tests/integrations/peers
	PYTHONPATH=$(PEERS)/sources/trl-current $(PEERS)/bin/python -m pytest tests/integrations/peers/test_trl_grpo.py
	$(PEERS)/bin/python -m benchmarks.peer_agreement
	$(PEERS)/bin/python -m benchmarks.peer_suites

# verl, OpenRLHF and torchtune are installed with --no-deps: they require older releases, and libraries that the compared
# functions do not use.
$(PEERS)/.built: $(SOURCES) benchmarks/constraints-peers.txt
	test -x $(PEERS)/bin/python || $(PYTHON) -m venv $(PEERS)
	$(PEERS)/bin/python -m pip install --quiet --constraint constraints.txt --constraint benchmarks/constraints-peers.txt \
		--editable . pytest transformers trl liger-kernel cut-cross-entropy peft \
		ray tensordict omegaconf orjson codetiming hydra-core
	$(PEERS)/bin/python -m pip install --quiet --no-deps --constraint benchmarks/constraints-peers.txt verl openrlhf torchtune
	$(PEERS)/bin/python -m pip install --quiet --no-deps --upgrade --target $(PEERS)/sources/openrlhf-0.11.0 openrlhf==0.11.0
	$(PEERS)/bin/python -m pip install --quiet --no-deps --upgrade --target $(PEERS)/sources/openrlhf-0.7.5 openrlhf==0.7.5
	$(PEERS)/bin/python -m pip install --quiet --no-deps --upgrade --target $(PEERS)/sources/trl-0.11.4 trl==0.11.4
	$(PEERS)/bin/python -m pip install --quiet --no-deps --upgrade --target $(PEERS)/sources/trl-current trl==1.16.0
	touch $@

clean:
	rm -rf $(VENV) $(PEERS) build dist runs *.egg-info rlhf_kernels/*.so
