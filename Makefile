# make demo   set up .venv and run the demonstration: SmolLM2-135M, fetched once (92 MB), else the shipped checkpoint
# make test   set up .venv and run the test suite: every test, of long tables every row and column
# make test-matrix  the rest of those tables, and whole runs of what test tries in small; .ci/run runs it after test
# make test-all  both, then what takes many minutes more: the soak, 100,000 mutations, every kernel for every GPU
# make lint   set up .venv and check form and types: ruff and mypy
# make clean  remove .venv and everything that was built
#
# PYTHON names the interpreter (3.11 or newer) that the environment is made from. WORKERS is how many processes share the
# test files out, where pytest-xdist is installed; each takes up to 4 GB and two cores: three on two cores take a quarter
# longer than two. 0: none beside pytest itself.
#
# Which torch: one that PYTHON can already import is used as it is, so a CUDA machine keeps its own build. Otherwise a
# machine with an NVIDIA GPU gets the default build, and every other machine the release that is known to be a CPU build
# where it was tried. Where an index serves CUDA builds by default, install a CPU build of torch before.
# Without a network the set-up still succeeds where every package is already importable.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
CLIENTS := $(VENV)/.clients
REPLICAS := $(VENV)/.replicas
CPU_TORCH := torch==2.13.0
WORKERS ?= 2

USABLE_TORCH := import torch; assert tuple(map(int, torch.__version__.split(".")[:2])) >= (2, 11)
CUDA_TORCH := import torch; assert torch.version.cuda
RUNTIME := import torch, numba, numpy, safetensors, transformers, tokenizers, huggingface_hub, pydantic, yaml, \
	typer, rich, tqdm, scipy, psutil, hetero_attn, cpu_kernels, gpu_kernels, placement
# In the order of the files: tests/conftest.py puts the long ones first.
SHARED_OUT = $(shell $(BIN)/python -c 'import xdist' 2>/dev/null && \
	echo --numprocesses $(WORKERS) --dist loadfile --no-loadscope-reorder)

# Where nothing compiled is kept, every process that a test starts compiles some 200 files anew, and pytest its own.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: demo test test-matrix test-all lint clean

demo: $(READY)
	$(BIN)/python examples/demo.py

test: $(READY) $(CLIENTS)
	$(BIN)/python -m pytest $(SHARED_OUT)

test-matrix: $(READY) $(CLIENTS)
	$(BIN)/python -m pytest $(SHARED_OUT) -m matrix

test-all: test test-matrix $(REPLICAS)
	$(BIN)/python -m pytest -m "soak or aot_full or mutations"

lint: $(READY)
	$(BIN)/python -m ruff format --check --quiet .
	$(BIN)/python -m ruff check .
	$(BIN)/python -m mypy

$(READY): pyproject.toml Makefile
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make PYTHON=...")'
	@echo "setting up $(VENV) with $(PYTHON): some minutes the first time"
	@if $(PYTHON) -c '$(USABLE_TORCH)' 2>/dev/null; then $(PYTHON) -m venv --system-site-packages $(VENV); \
	else $(PYTHON) -m venv $(VENV); fi
	@if $(BIN)/python -c '$(USABLE_TORCH)' 2>/dev/null; then echo "torch: using the one that is installed"; \
	elif nvidia-smi -L >/dev/null 2>&1; then $(BIN)/pip install --quiet 'torch>=2.11'; \
	else $(BIN)/pip install --quiet $(CPU_TORCH); fi
	@extras=test,plot,lint; if $(BIN)/python -c '$(CUDA_TORCH)' 2>/dev/null; then extras=test-tools,plot,lint; fi; \
	$(BIN)/pip install --quiet --editable ".[$$extras]" \
		|| $(BIN)/pip install --quiet --no-build-isolation --no-deps --editable . || { \
		echo "pip could not install this package: its folder is put on the path instead"; \
		echo "$(CURDIR)" > "$$($(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/hetero_attn.pth"; }
	@$(BIN)/python -P -c '$(RUNTIME)'
	@touch $@

$(REPLICAS): $(READY)
	@echo "installing Ray Serve for its test, where the network has it"
	@$(BIN)/pip install --quiet --editable ".[replicas]" || \
		echo "Ray Serve could not be installed: its test says so and is skipped"
	@touch $@

$(CLIENTS): $(READY)
	@echo "installing the server's clients for the tests, where the network has them"
	@$(BIN)/pip install --quiet --editable ".[clients]" || \
		echo "LangChain, LlamaIndex or lm-eval could not be installed: tests that are their clients say so and are skipped"
	@touch $@

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
