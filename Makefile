# `make demo` and `make test` do all their own set-up; they need Python >= 3.11 and make, nothing else.
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
CASES  ?= 10000
SEED   ?= 0
MODELS ?= demo
# A machine with no NVIDIA driver gets a pinned torch first, so that nothing pulls the CUDA packages.
TORCH  ?= $(shell command -v nvidia-smi >/dev/null 2>&1 && echo 'torch>=2.6' || echo 'torch==2.13.0')

.PHONY: demo test fuzz fuzz-sanitize sanitize test-neon conformance real lint types tour clean

$(VENV)/.ready: pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	    echo "optim needs Python 3.11 or newer, and $(PYTHON) is $$($(PYTHON) --version 2>&1)" >&2; \
	    echo "  fix: make PYTHON=/path/to/python3.11 $(MAKECMDGOALS)" >&2; exit 2; }
	@$(PYTHON) -c 'import ensurepip, venv' || { \
	    echo "$(PYTHON) cannot make virtual environments" >&2; \
	    echo "  fix: install its venv package (on Debian: python3-venv)" >&2; exit 2; }
	@echo "setting up $(VENV): a few minutes, once"
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet '$(TORCH)'
	$(BIN)/pip install --quiet --editable '.[dev]'
	touch $@

demo: $(VENV)/.ready
	test -d smollm2-awq || $(BIN)/optim quantize demo -m awq --num-samples 16 -o smollm2-awq
	$(BIN)/optim run smollm2-awq "What is the capital of France?" --temperature 0

test: $(VENV)/.ready
	$(BIN)/python -m pytest -m "not gpu"

# C kernels with the address and undefined-behaviour sanitizers, under the tests that run them
SANITIZED := tests/runtime/kernels/cpu tests/runtime/test_levels.py
PRELOAD = $(shell gcc -print-file-name=libasan.so) $(shell gcc -print-file-name=libubsan.so) \
    $(shell gcc -print-file-name=libstdc++.so)
WATCHED = OPTIM_SANITIZE=1 LD_PRELOAD="$(PRELOAD)" \
    ASAN_OPTIONS=detect_leaks=0:allocator_may_return_null=1
# fuzzed models of the kinds whose bytes reach C kernels
REACHING := --kind shards --kind side --kind static --kind lossless --kind session --kind foreign
sanitize: $(VENV)/.ready
	$(WATCHED) $(BIN)/python -m pytest -q -s $(SANITIZED) -k "not every_machine and not neon"
	$(WATCHED) $(BIN)/python tests/fuzz/run.py $(REACHING) --cases 48 --seed 1

# the same with many more cases: make fuzz-sanitize CASES=600
fuzz-sanitize: $(VENV)/.ready
	$(WATCHED) $(BIN)/python tests/fuzz/run.py $(REACHING) --cases $(CASES) --seed $(SEED)

# the ARM kernels under qemu: needs Debian's gcc-aarch64-linux-gnu and qemu-user (`make test` runs
# them too where these are installed)
test-neon: $(VENV)/.ready
	$(BIN)/python -m pytest -q tests/runtime/kernels/cpu/test_neon.py

# each family and variant of its configuration beside transformers, as a table
conformance: $(VENV)/.ready
	$(BIN)/python -m tests.conformance

# real models through every command: make real MODELS="demo gemma-3-270m.gguf"
real: $(VENV)/.ready
	$(BIN)/python tests/real/run.py $(MODELS)

# 10,000 cases take about half an hour on one core; a short run is part of `make test`.
fuzz: $(VENV)/.ready
	$(BIN)/python tests/fuzz/run.py --cases $(CASES) --seed $(SEED)

lint: $(VENV)/.ready
	$(BIN)/ruff check
	$(BIN)/ruff format --check

types: $(VENV)/.ready
	mkdir -p .typing/optim
	for d in cli quant prune export runtime recipes program/__main__.py; do \
	    ln -sfn ../../$$d .typing/optim/$${d#program/}; done
	$(BIN)/mypy

tour: $(VENV)/.ready
	$(BIN)/python docs/run_tour.py docs/tour.md docs/python.md

clean:
	rm -rf $(VENV) .typing build dist *.egg-info
