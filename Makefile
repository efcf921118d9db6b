# Everything needs only make and Python 3.11 or newer: the first target that runs makes .venv.
#
#   make demo                          train the embedded model on this machine
#   make demo ARGS="steps=20"          the same with another setting of the recipe
#   make test ARGS="-k advantages"     arguments go to pytest
#   make test PYTHON=python3.12        make .venv with another Python
#   AREALITE_DEVICE=cpu make demo      CPU packages in spite of a GPU

PYTHON ?= python3
ARGS ?=
BIN := .venv/bin
NOTEBOOKS = $(wildcard notebooks/*.ipynb)
DEMO = $(BIN)/torchrun recipes/gsm8k_grpo.py out_dir=runs/demo

# A tokenizer that has started threads warns at every later fork.
export TOKENIZERS_PARALLELISM ?= false

# A test that asks for something on the Hub shall fail at once instead of waiting for a network, and
# models of the tests are so small that a second thread only takes the core of another process.
test soak mutants: export HF_HUB_OFFLINE ?= 1
test soak mutants: export OMP_NUM_THREADS ?= 1

.DEFAULT_GOAL := help
.PHONY: help setup demo learn-hard test soak gpu-check mutants lint format clean

help:
	@echo "make demo     train the embedded model with the default recipe, ARGS=\"key=value ...\""
	@echo "make learn-hard does the recipe improve wrong steps, and a coin as reward not?"
	@echo "make test     lint, layers, types and tests, as CI runs them, ARGS=\"pytest arguments\""
	@echo "make soak     the tests that kill real servers or run for minutes"
	@echo "make gpu-check every path that only runs on a GPU: pass, fail or not run"
	@echo "make mutants  change arealite/algo in every small way: do its tests notice? Five minutes;"
	@echo "              ARGS=admission: the same of the state machine of rollouts"
	@echo "make lint     all of make test but the tests"
	@echo "make format   put code and notebooks into the project's format"
	@echo "make setup    only make .venv, or bring it up to date"
	@echo "make clean    remove .venv, caches and build output; runs/ stays"

setup:
	@$(PYTHON) .ci/setup.py

# From the beginning each time; a run of your own continues where it stopped.
demo: setup
	@if [ -e runs/demo ]; then rm -rf runs/demo.previous; mv -v runs/demo runs/demo.previous; fi
	$(DEMO) $(ARGS)

learn-hard: setup
	$(BIN)/python benchmarks/learn_hard.py $(ARGS)

# $(call stage,headline,command): the first stage that fails ends the target.
define stage
	@printf '\n==> %s\n' '$(1)'; began=$$(date +%s); \
	if $(2); then printf '    ok, %d s\n' $$(($$(date +%s) - began)); \
	else printf '\n==> FAILED: %s, after %d s\n' '$(1)' $$(($$(date +%s) - began)); exit 1; fi
endef

lint: setup
	$(call stage,ruff check,$(BIN)/ruff check)
	$(call stage,ruff format,$(BIN)/ruff format --check)
	$(call stage,layers,$(BIN)/lint-imports --no-logo)
	$(call stage,types,$(BIN)/pyright)
	$(if $(NOTEBOOKS),$(call stage,notebooks without output,$(BIN)/nbstripout --keep-id --verify $(NOTEBOOKS)))

test: lint
	$(call stage,tests,$(BIN)/pytest -q --durations=15 $(ARGS))

soak: setup
	$(call stage,soak,$(BIN)/pytest -q --durations=15 -m soak $(ARGS))
	$(call stage,random kills and faults,$(BIN)/python -m tests.soak.random_faults)

gpu-check: setup
	$(BIN)/python -m tests.gpu.check

mutants: setup
	$(BIN)/python .ci/mutants.py $(ARGS)

format: setup
	$(BIN)/ruff check --fix
	$(BIN)/ruff format
	$(if $(NOTEBOOKS),$(BIN)/nbstripout --keep-id $(NOTEBOOKS))

clean:
	rm -rf .venv build dist *.egg-info .pytest_cache .ruff_cache .hypothesis .import_linter_cache
	find . -name __pycache__ -type d -not -path './.git/*' -prune -exec rm -rf {} +
