# `make help` lists the targets. Everything lives in .venv; `make setup` installs only when the pins have changed.
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

# The pins were made with 3.11, so it comes first; a Python without venv and pip in it (Debian splits them off) is no use.
PYTHON ?= $(shell for p in python3.11 python3 python3.12 python3.13 python3.14 python; do \
  $$p -c 'import ensurepip, sys, venv; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1 && { echo $$p; break; }; done)

.DEFAULT_GOAL := help
.PHONY: help setup demo test test-slow test-net test-tpm crash soak lint format format-check types schema coverage fuzz experiments experiments-quick clean distclean

help: ## list the targets
	@sed -n 's/^\([a-z-]*\):[^#]*## \(.*\)/  make \1|\2/p' $(firstword $(MAKEFILE_LIST)) | column -t -s '|' 2>/dev/null \
	  || sed -n 's/^\([a-z-]*\):[^#]*## \(.*\)/  make \1: \2/p' $(firstword $(MAKEFILE_LIST))

setup: $(STAMP) ## make .venv and install the pinned versions into it

$(STAMP): pyproject.toml constraints.txt
	@test -n "$(PYTHON)" || { echo "make: no Python 3.11 or newer with venv and pip was found; install one" \
	  "(Debian: apt install python3 python3-venv) or name it: make setup PYTHON=/path/to/python3.11" >&2; exit 1; }
	@$(BIN)/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv --clear $(VENV)
	@echo 'installing the pinned versions into $(VENV); the first time takes some minutes'
	$(BIN)/python -m pip install --disable-pip-version-check -qq -c constraints.txt -e '.[dev]'
	@touch $@

demo: setup ## run the main job on bundled data: one enclave and five parties on this machine
	$(BIN)/cloister demo --out demo-run

test: setup ## run the tests, those that start several processes included
	$(BIN)/python -m pytest -n 2 -m 'not slow and not tpm and not net'

test-slow: setup ## run the slow tests: the wheel in an empty environment, large streams
	$(BIN)/python -m pytest -m slow

test-net: setup ## run the tests over a bad network, with many parties, strangers and two users at once; as root
	$(BIN)/python -m pytest tests/net -m net

test-tpm: setup ## run the tests against a software TPM (swtpm)
	@command -v swtpm >/dev/null && command -v swtpm_setup >/dev/null || { echo "make: these tests need a software TPM:" \
	  "apt install swtpm swtpm-tools (Fedora: dnf install swtpm swtpm-tools)" >&2; exit 1; }
	$(BIN)/python -m pytest tests/tpm -m tpm

coverage: setup ## branch coverage of attest, channel, crypto: 100 % or it fails; needs the samples of tests/evidence.py
	$(BIN)/python -m pytest -p no:xdist -m 'not slow' --cov --cov-report=term-missing:skip-covered \
	  tests/unit/attest tests/unit/channel tests/unit/crypto tests/attacks

experiments: setup ## the study of accuracy behind docs/results.md: hours; begun again, it goes on where it stopped
	$(BIN)/python -m experiments

experiments-quick: setup ## the same systems, one seed, no tuned rates, minutes: into runs/experiments-quick
	$(BIN)/python -m experiments --quick

TARGET ?=
SECONDS ?= 600
fuzz: setup ## fuzz all parsers, or one of them: make fuzz TARGET=receipt SECONDS=60
	$(BIN)/python -m tests.fuzz $(TARGET) --seconds $(SECONDS)

TRIALS ?= 100
SEED ?= 1
ROLE ?=
crash: setup ## kill roles (or ROLE) at seeded points, fill disks, set clocks, cut files: make crash TRIALS=100 SEED=1
	OMP_NUM_THREADS=1 $(BIN)/python -W ignore -m tests.crash --trials $(TRIALS) --seed $(SEED) $(addprefix --role ,$(ROLE))

HOURS ?= 2
soak: setup ## hours of jobs with faults and of clients that misbehave, watching for leaks: make soak HOURS=2
	OMP_NUM_THREADS=1 $(BIN)/python -W ignore -m tests.soak --hours $(HOURS)

lint: setup ## look for mistakes
	$(BIN)/ruff check

format: setup ## rewrite the layout of all Python files
	$(BIN)/ruff format
	$(BIN)/ruff check --fix

format-check: setup ## check the layout of all Python files
	$(BIN)/ruff format --check

types: setup ## check the types
	$(BIN)/mypy

schema: setup ## rewrite docs/schema from the output models
	$(BIN)/python -m cloister.report.schema

clean: ## remove caches, builds and the demo's results
	rm -rf build dist demo-run .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find src tests -name __pycache__ -type d -prune -exec rm -rf {} +

distclean: clean ## also remove .venv
	rm -rf $(VENV)
