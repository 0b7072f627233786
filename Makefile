# Needs make and a Python of 3.11 or later; everything else goes into .venv.

PYTHON ?= $(shell for p in python3 python3.11 python3.12 python3.13 python3.14; do \
	$$p -c 'import sys, venv; sys.exit(sys.version_info < (3, 11))' 2>/dev/null \
	&& echo $$p && break; done)
BIN := .venv/bin
# -qq: pip warns at length about every package index that it passes over.
PIP := $(BIN)/python -m pip --disable-pip-version-check -qq
# Their wheels name torch, and pip could replace the build at hand by another one.
NO_DEPS := torchvision==0.28.0 timm==1.0.31 lightning==2.6.6

# Dozens of processes import the package: its bytecode is kept, whatever the environment says.
CPU := CUDA_VISIBLE_DEVICES= OMP_NUM_THREADS=1 PYTHONDONTWRITEBYTECODE=

.PHONY: help venv test test-thorough test-gpu demo bench clean

help: ## List the targets
	@sed -n 's/^\([a-z-]*\):.*## /  make \1	/p' Makefile | expand -t 16

venv: .venv/stamp ## Create .venv with the pinned dependencies (again when they change)

.venv/stamp: pyproject.toml requirements-dev.txt Makefile tools/repair_torchvision.py
	@test -n "$(PYTHON)" || { echo "make: no Python >= 3.11 with venv found;" \
		"install one, or name it: make PYTHON=/path/to/python" >&2; exit 1; }
	@echo "venv: creating .venv with $$($(PYTHON) --version)"
	@$(PYTHON) -m venv .venv
	@echo "venv: installing torch"
	@$(PIP) install $$(grep '^torch==' requirements-dev.txt)
	@echo "venv: installing the dependencies"
	@$(PIP) install -r requirements-dev.txt
	@$(PIP) install --no-deps $(NO_DEPS)
	@$(BIN)/python tools/repair_torchvision.py
	@echo "venv: installing autopar, editable"
	@$(PIP) install --no-deps --no-build-isolation -e .
	@touch $@

# One thread per process, no GPU. tests/dist runs four processes per worker, so it comes after the rest; a
# file's tests share a worker, and what they computed once.
test: venv ## Lint, check types, run the tests
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy autopar
	$(CPU) $(BIN)/python -m pytest -q --durations=15 -n 2 --dist loadfile tests --ignore tests/dist
	$(CPU) $(BIN)/python -m pytest -q --durations=15 -n 2 --dist loadfile tests/dist

test-thorough: venv ## Run all cases of the tests of which make test takes a sample
	$(CPU) $(BIN)/python -m pytest -q --thorough -n 2 --dist loadfile tests --ignore tests/dist
	$(CPU) $(BIN)/python -m pytest -q --thorough -n 2 --dist loadfile tests/dist

test-gpu: venv ## Run the tests that need a GPU
	$(BIN)/python -m pytest -q -m gpu tests/gpu tests/kernels tests/unit/test_memory_prefetch.py

demo: venv ## Train a small GPT-2 on four local processes
	$(BIN)/python -m torch.distributed.run --standalone --nproc-per-node 4 examples/train_gpt2.py

bench: venv ## Say how to run the benchmarks
	@echo "Run one of these; --help says what it measures:"
	@for f in $$(grep -l __main__ benchmarks/*.py); do \
		echo "  $(BIN)/python -m benchmarks.$$(basename $$f .py)"; done

clean: ## Remove .venv, caches and build products
	rm -rf .venv build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
