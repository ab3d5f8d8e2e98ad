# The two commands of the README are `make hpo` and `make test`. Each makes the virtual environment first.
VENV ?= .venv
PYTHON ?= python3
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check
# the exact versions that are installed; `make CONSTRAINTS=` takes the newest ones instead
CONSTRAINTS ?= constraints.txt
PIN := $(addprefix -c ,$(CONSTRAINTS))
TORCH := torch$(addprefix ==,$(shell sed -n 's/^torch==//p' $(CONSTRAINTS) /dev/null))
CPU_INDEX := https://download.pytorch.org/whl/cpu
SAMPLE := runs/sample
TESTS := $(BIN)/python -m pytest

.PHONY: help install hpo test test-slow chromium postgresql lint format bench clean

help:  ## show this list
	@sed -n 's/^\([a-z-]*\):.*## /\1\t/p' $(MAKEFILE_LIST) | expand -t 12

$(BIN)/python:
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or later is needed, this is " + sys.version)'
	$(PYTHON) -m venv $(VENV)

# With an NVIDIA driver the registry's build of torch, which is the CUDA one on Linux. Else the CPU build, which is
# gigabytes smaller: from the places that pip knows, else from PyTorch's own index; where neither has one for this
# Python, the registry's build.
CPU_BUILD := $(if $(findstring ==,$(TORCH)),"$(TORCH)+cpu" --extra-index-url,torch --index-url) $(CPU_INDEX)
$(VENV)/.torch: $(CONSTRAINTS) | $(BIN)/python
	@if [ "$$(uname -s)" != Linux ] || [ -e /proc/driver/nvidia/version ]; then \
	    echo "installing $(TORCH) from the package registry"; \
	    $(PIP) "$(TORCH)" $(PIN); \
	else \
	    echo "no NVIDIA driver: installing the CPU build of $(TORCH)"; \
	    $(PIP) "$(TORCH)+cpu" $(PIN) 2>/dev/null || $(PIP) $(CPU_BUILD) $(PIN) --retries 1 --timeout 15 2>/dev/null || { \
	        echo "no CPU build of $(TORCH) for this Python is to be had: installing the package registry's build (some GB)"; \
	        $(PIP) "$(TORCH)" $(PIN); }; \
	fi
	@touch $@

$(VENV)/.run: $(VENV)/.torch pyproject.toml
	@echo "installing lightning-bge into $(VENV)"
	@$(PIP) --editable . $(PIN)
	@$(BIN)/python -c 'import torch; print("torch", torch.__version__, "- CUDA", torch.version.cuda or "none: CPU build")'
	@touch $@

$(VENV)/.test: $(VENV)/.run
	@$(PIP) --editable '.[test]' $(PIN)
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

# what only the slow tests need: other storages and launchers, what shows studies, and the schemas of Kubernetes (100 MB)
$(VENV)/.slow: $(VENV)/.test
	@$(PIP) --editable '.[test,postgres,grpc,ray,dashboard,tensorboard,wandb]' kubernetes-validate $(PIN)
	@touch $@

# MLflow excludes the pyarrow of the other tests: an environment beside theirs, which sees all other packages of it
$(VENV)-mlflow/.slow: $(VENV)/.slow constraints-mlflow.txt
	@echo "installing MLflow into $(VENV)-mlflow"
	@$(BIN)/python -m venv $(VENV)-mlflow
	@$(BIN)/python -c 'import site; print(site.getsitepackages()[0])' > \
	    "$$($(VENV)-mlflow/bin/python -c 'import site; print(site.getsitepackages()[0])')/tests.pth"
	@$(VENV)-mlflow/bin/python -m pip install --quiet --disable-pip-version-check 'mlflow>=3' \
	    $(and $(CONSTRAINTS),-c constraints-mlflow.txt)
	@touch $@

# Modules of other projects, whose pins are others' too
$(VENV)-projects/.slow: $(VENV)/.slow examples/projects/requirements.txt constraints-projects.txt
	@echo "installing other projects into $(VENV)-projects"
	@$(BIN)/python -m venv $(VENV)-projects
	@$(BIN)/python -c 'import site; print(site.getsitepackages()[0])' > \
	    "$$($(VENV)-projects/bin/python -c 'import site; print(site.getsitepackages()[0])')/tests.pth"
	@$(VENV)-projects/bin/python -m pip install --quiet --disable-pip-version-check \
	    -r examples/projects/requirements.txt $(and $(CONSTRAINTS),-c constraints-projects.txt)
	@touch $@

test-slow: export OMP_NUM_THREADS = 1
test-slow: $(VENV)/.slow $(VENV)-mlflow/.slow $(VENV)-projects/.slow chromium postgresql  ## what needs servers, browsers or minutes
	$(TESTS) -m slow --numprocesses 2 --dist loadfile --durations 30

# Debian's packages: the browser in which the reports are looked at, and a database
SUDO := $(if $(filter-out 0,$(shell id -u)),sudo)
chromium:
	@command -v chromium >/dev/null || $(call DEBIAN,chromium)

postgresql:
	@ls /usr/lib/postgresql/*/bin/initdb >/dev/null 2>&1 || $(call DEBIAN,postgresql)

define DEBIAN
	{ echo "installing $(1)"; \
	  $(SUDO) apt-get update -qq && $(SUDO) apt-get install -y -qq --no-install-recommends $(1) >/dev/null; }
endef

lint: $(VENV)/.test  ## ruff, mypy, import-linter, private names of other libraries
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/python tests/tools/private_names.py

format: $(VENV)/.test  ## let ruff fix what it can
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

bench: $(VENV)/.test  ## training and search speed against the peers, in turns: hours, with nothing else on the machine
	$(PIP) -r examples/benchmarks/requirements.txt $(PIN)
	$(BIN)/python examples/benchmarks/train_speed.py --peers all
	$(BIN)/python examples/benchmarks/hpo_race.py

clean:  ## remove the environment and the runs
	rm -rf $(VENV) $(VENV)-mlflow $(VENV)-projects runs
