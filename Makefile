# Everything needs Python 3.11 and a package registry, nothing else; each target sets up what it needs.
#   make demo    raw videos -> autoencoder -> latents -> training on two ranks -> prompted samples -> out/demo/report.html
#   make test    the test suite
#   make bench   our training step beside the same block in plain PyTorch and diffusers' (5 minutes)
#   make chaos   the demo's training killed at 20 random instants and resumed: nothing may differ to the last bit
#   make slurm-test   a run that a real SLURM of one node ends in six ways: likewise (needs root and Debian packages)

VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
# A python3.11 of that name, else a python3 that is one.
PYTHON ?= $(shell for p in python3.11 python3 python; do \
	$$p -c 'import sys; sys.exit(sys.version_info[:2] != (3, 11))' 2>/dev/null && echo $$p && break; done)

# Ranks share the cores: more threads than cores each make two ranks several times slower.
export OMP_NUM_THREADS ?= 1

.PHONY: help setup test demo bench chaos slurm-test lint clean

help:  ## what there is to make
	@sed -n 's/^\([a-z-]*\):.*## /\1\t/p' $(MAKEFILE_LIST)

setup: $(STAMP)  ## the virtual environment, .venv

test: $(STAMP)  ## the test suite
	$(BIN)/python -m pytest -q

demo: $(STAMP)  ## the whole chain at toy size; ends with out/demo/report.html
	$(BIN)/moviegen demo

bench: $(STAMP)  ## our training step beside plain PyTorch's and diffusers', on this CPU; BENCH="--parts demo"
	$(BIN)/moviegen bench steps $(BENCH)

chaos: $(STAMP)  ## training killed at 20 random instants resumes to the last bit; CHAOS="--kills 3 --launcher"
	$(BIN)/python tests/chaos.py $(CHAOS)

slurm-test: $(STAMP)  ## SLURM with one node, out of Debian's packages: pre-empted, killed, cancelled, requeued, hung
	$(BIN)/python tests/slurm/end_to_end.py

lint: $(STAMP)  ## formatting and lint
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

clean:  ## everything but the environment that these targets wrote
	rm -rf out build dist *.egg-info .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -not -path './$(VENV)/*' -prune -exec rm -rf {} +

$(STAMP): requirements.txt constraints.txt pyproject.toml
	@test -n "$(PYTHON)" || { echo "moviegen needs Python 3.11 and found none: install it, or make PYTHON=/path/to/python3.11" >&2; exit 1; }
	@test -x $(BIN)/pip || $(PYTHON) -m venv $(VENV)
	@echo "installing into $(VENV): some minutes and 3.5 GB the first time"
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.txt -c constraints.txt
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation -e .
	@touch $@
