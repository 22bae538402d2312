# fastsac: `make help` lists the targets. To use another Python: make install PYTHON=python3.12
SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:

PYTHON ?= python3
ARGS ?=
# twice as many as there are cores, at most four: many tests wait for other processes
WORKERS ?= $(shell cores=$$(nproc 2>/dev/null || echo 2); echo $$(( cores < 2 ? 2 : 4 )))
RESULTS := benchmarks/results
BENCH_JSON ?= $(RESULTS)/bench_cpu.json
PEERS_JSON ?= $(RESULTS)/peers_cpu.json

VENV := .venv
PEERS := .venv-peers
BIN := $(VENV)/bin
# -qq keeps errors and drops pip's progress and warnings.
PIP_INSTALL := -m pip install -qq --disable-pip-version-check

# $(call make_venv,DIR): create a virtual environment in DIR, unless there is a working one.
define make_venv
@command -v $(PYTHON) >/dev/null || { echo "error: no $(PYTHON): install Python 3.11 or newer, or name it: make $(MAKECMDGOALS) PYTHON=python3.12" >&2; exit 1; }
@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "error: $$($(PYTHON) --version) is too old: fastsac needs 3.11 or newer: make $(MAKECMDGOALS) PYTHON=python3.12" >&2; exit 1; }
@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { echo "error: $(PYTHON) has no venv module: install it (Debian and Ubuntu: apt install python3-venv)" >&2; exit 1; }
@$(1)/bin/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv --clear $(1)
endef

.PHONY: help install train docs test test-slow bench bench-peers learning clean

help: ## list the targets
	@echo 'usage: make TARGET [ARGS="more arguments for the command"]'
	@sed -n 's/^\([a-z-]*\):[^#]*## \(.*\)/  \1|\2/p' $(MAKEFILE_LIST) | awk -F'|' '{printf "%-14s%s\n", $$1, $$2}'

install: $(VENV)/.installed ## set up .venv with fastsac and the developer tools, at the versions in constraints.txt

$(VENV)/.installed: pyproject.toml constraints.txt
	$(call make_venv,$(VENV))
	@echo 'installing into $(VENV): a few minutes the first time'
	@$(BIN)/python $(PIP_INSTALL) -c constraints.txt -e '.[dev]'
	@touch $@

train: install ## train a policy on Pendulum-v1 to a return of -180
	$(BIN)/fastsac train --env-id Pendulum-v1 --total-steps 30000 --num-envs 4 --target-return -180 \
	  --eval-every 2000 --eval-episodes 20 $(ARGS)

docs: install ## build the documentation as a site: site/index.html, readable offline
	@PYTHONPATH=.:kernels NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict --quiet
	@echo 'documentation: site/index.html'

test: install ## check style, types and import layers; compile kernels for six chips (if changed); build the documentation; run the tests
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-logo
	$(BIN)/python -m benchmarks.compile_kernels --if-changed
	@$(MAKE) --no-print-directory docs
	$(BIN)/python -m pytest -n $(WORKERS) --dist worksteal $(ARGS)

test-slow: install ## run the slow tests
	$(BIN)/python -m pytest -m 'slow and not gpu' $(ARGS)

bench: install ## time kernels, actor steps and updates by estimator and backend (BENCH_JSON names the file)
	@mkdir -p $(dir $(BENCH_JSON))
	$(BIN)/python -m pytest benchmarks/ -q --benchmark-only --benchmark-quiet --bench-json=$(BENCH_JSON) $(ARGS)
	$(BIN)/python -m benchmarks.report --bench $(BENCH_JSON)

bench-peers: install $(PEERS)/.installed ## time fastsac against Stable-Baselines3 and SBX (PEERS_JSON names the file)
	$(BIN)/python -m benchmarks.peers --peer-python $(PEERS)/bin/python --out $(PEERS_JSON) $(ARGS)

$(PEERS)/.installed: benchmarks/peers-constraints.txt
	$(call make_venv,$(PEERS))
	@echo 'installing into $(PEERS): a few minutes the first time'
	@$(PEERS)/bin/python $(PIP_INSTALL) -c $< torch stable-baselines3 sbx-rl 'gymnasium[mujoco]'
	@touch $@

learning: install ## measure learning curves over seeds
	$(BIN)/python -m benchmarks.learning $(ARGS)

clean: ## remove the virtual environments, build outputs and caches (runs/ stays)
	rm -rf $(VENV) $(PEERS) build dist site .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis .benchmarks
	find fastsac kernels tests benchmarks -name __pycache__ -type d -prune -exec rm -rf {} + 2>/dev/null || true
