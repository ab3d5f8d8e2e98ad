# The two commands of the README are `make hpo` and `make test`. Each makes the virtual environment first.
VENV ?= .venv
PYTHON ?= python3
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check
TORCH := $(shell sed -n 's/^torch==//p' constraints.txt)
CPU_INDEX := https://download.pytorch.org/whl/cpu
SAMPLE := runs/sample
TESTS := $(BIN)/python -m pytest

.PHONY: help install hpo test test-slow chromium lint format bench clean

help:  ## show this list
	@sed -n 's/^\([a-z-]*\):.*## /\1\t/p' $(MAKEFILE_LIST) | expand -t 12

$(BIN)/python:
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or later is needed, this is " + sys.version)'
	$(PYTHON) -m venv $(VENV)

# With an NVIDIA driver the registry's build of torch, which is the CUDA one on Linux; else the CPU build, which is
# gigabytes smaller: from the places that pip knows if they have it, else from PyTorch's own index.
$(VENV)/.torch: constraints.txt | $(BIN)/python
	@if [ "$$(uname -s)" = Linux ] && [ ! -e /proc/driver/nvidia/version ]; then \
	    echo "no NVIDIA driver: installing the CPU build of torch $(TORCH)"; \
	    $(PIP) "torch==$(TORCH)+cpu" -c constraints.txt 2>/dev/null || \
	    $(PIP) "torch==$(TORCH)+cpu" -c constraints.txt --extra-index-url $(CPU_INDEX); \
	else \
	    echo "installing torch $(TORCH) from the package registry"; \
	    $(PIP) "torch==$(TORCH)" -c constraints.txt; \
	fi
	@touch $@

$(VENV)/.run: $(VENV)/.torch pyproject.toml
	@echo "installing lightning-bge into $(VENV)"
	@$(PIP) --editable . -c constraints.txt
	@$(BIN)/python -c 'import torch; print("torch", torch.__version__, "- CUDA", torch.version.cuda or "none: CPU build")'
	@touch $@

$(VENV)/.test: $(VENV)/.run
	@$(PIP) --editable '.[test]' -c constraints.txt
	@touch $@

install: $(VENV)/.run  ## make the virtual environment and install into it

# one thread: so small a model gains little from more, and loses much where something else runs on the machine
hpo: export OMP_NUM_THREADS = 1
hpo: $(VENV)/.run  ## search, refit and export on generated text pairs: the main job, in about a minute
	@$(BIN)/lightning-bge sample $(SAMPLE)
	@$(BIN)/lightning-bge hpo -c configs/quickstart.yaml
	@echo
	@echo "Next, with your own pairs of texts:"
	@echo "  $(BIN)/lightning-bge hpo -c configs/hpo.yaml --data.train_file pairs.csv --data.text_columns '[text, criterion]'"

test: export OMP_NUM_THREADS = 1
test: lint  ## linters, types, import doors, and the test suite
	$(TESTS) --numprocesses 2

test-slow: $(VENV)/.test chromium  ## what needs servers, browsers or minutes
	$(TESTS) -m slow

# Debian's browser, in which the reports are looked at
chromium:
	@command -v chromium >/dev/null || { \
	    echo "installing chromium"; \
	    if [ "$$(id -u)" = 0 ]; then apt-get update -qq && apt-get install -y -qq --no-install-recommends chromium; \
	    else sudo apt-get update -qq && sudo apt-get install -y -qq --no-install-recommends chromium; fi >/dev/null; }

lint: $(VENV)/.test  ## ruff, mypy, import-linter, private names of other libraries
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/python tests/tools/private_names.py

format: $(VENV)/.test  ## let ruff mend what it can
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

bench: $(VENV)/.test  ## training and search speed against the peers, in turns: hours, with nothing else on the machine
	$(PIP) -r examples/benchmarks/requirements.txt -c constraints.txt
	$(BIN)/python examples/benchmarks/train_speed.py --peers all
	$(BIN)/python examples/benchmarks/hpo_race.py

clean:  ## remove the environment and the runs
	rm -rf $(VENV) runs
