# `make serve` is all a newcomer needs; `make help` lists the rest.

PYTHON      ?= python3
VENV        ?= .venv
# Extra package index for torch. Plain pip brings the CUDA build of several GB; for a machine
# without a GPU: make serve TORCH_INDEX=https://download.pytorch.org/whl/cpu
TORCH_INDEX ?=
# More arguments for the command at hand: make serve ARGS="--port 9000"
ARGS        ?=

BIN  := $(VENV)/bin
PIP   = $(BIN)/python -m pip install --quiet --disable-pip-version-check \
        $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX))
LINT := kernels adapter_store workers cluster tests benchmarks deploy
# Every package of the process tree shares the cores: torch must not take them all per process.
ONE_THREAD := OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false

.DEFAULT_GOAL := help
.PHONY: help venv install install-dev serve test soak lint format types wheel bench clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-12s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)
	@echo
	@echo "  Variables: PYTHON=$(PYTHON) VENV=$(VENV) TORCH_INDEX=$(TORCH_INDEX) ARGS=$(ARGS)"

venv: $(BIN)/python ## make the virtual environment

$(BIN)/python:
	@command -v $(PYTHON) >/dev/null || { \
	  echo "error: $(PYTHON) was not found. Install Python 3.11 or newer, or name it:" \
	       "make $(MAKECMDGOALS) PYTHON=/path/to/python3.12" >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "error: Loraplex needs Python 3.11 or newer; $(PYTHON) is" \
	       "$$($(PYTHON) --version 2>&1). Name another: make $(MAKECMDGOALS) PYTHON=python3.12" >&2; \
	  exit 1; }
	@echo "making the virtual environment $(VENV)"
	@$(PYTHON) -m venv $(VENV) || { \
	  echo "error: $(PYTHON) can't make virtual environments. On Debian and Ubuntu:" \
	       "apt install python3-venv" >&2; rm -rf $(VENV); exit 1; }

# Installed once per version of pyproject.toml.
$(VENV)/.installed: pyproject.toml | $(BIN)/python
	@echo "installing Loraplex into $(VENV) (minutes, the first time)"
	@$(PIP) -e '.[local]'
	@touch $@

$(VENV)/.installed-dev: pyproject.toml | $(BIN)/python
	@echo "installing Loraplex and the tools for its development into $(VENV)"
	@$(PIP) -e '.[dev]'
	@touch $@ $(VENV)/.installed

install: $(VENV)/.installed ## install what serving needs

install-dev: $(VENV)/.installed-dev ## install what tests, lint and training need as well

serve: install ## start the whole service on this machine, with the demo tenants
	@$(BIN)/loraplex up $(ARGS)

test: install-dev ## the whole CPU suite: under 15 minutes on 2 cores
	$(ONE_THREAD) $(BIN)/python -m pytest -m 'not soak and not gpu' $(ARGS)

soak: install-dev ## long runs and chaos
	$(ONE_THREAD) $(BIN)/python -m pytest -m soak --timeout 3600 $(ARGS)

lint: install-dev ## ruff: rules and format
	$(BIN)/ruff check $(LINT)
	$(BIN)/ruff format --check $(LINT)

format: install-dev ## let ruff rewrite the files
	$(BIN)/ruff check --fix $(LINT)
	$(BIN)/ruff format $(LINT)

types: install-dev ## pyright
	$(BIN)/pyright

wheel: install-dev ## build dist/*.whl
	@rm -rf build dist
	$(BIN)/python -m build --quiet --wheel --outdir dist .

bench: install-dev ## every benchmark: tables, and JSON under benchmarks/results/<machine>/
	@for file in benchmarks/[a-z]*.py; do echo "== $$file"; $(BIN)/python $$file $(ARGS) || exit 1; done

clean: ## remove what was built; the virtual environment and .loraplex/ stay
	rm -rf build dist .pytest_cache .ruff_cache .hypothesis *.egg-info
	find $(LINT) -name __pycache__ -type d -prune -exec rm -rf {} +
