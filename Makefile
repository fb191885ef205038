# Two commands do everything on a fresh machine: `make join` trains, `make test` checks. Both make .venv first.

PYTHON ?= python3
VENV   ?= .venv
SEEDS  ?= 200
BIN    := $(VENV)/bin
NODE   := $(BIN)/braniac-node

# torch goes in first and by itself: pip then finds the pinned wheel and never weighs another against it.
TORCH  := $(shell sed -n 's/^ *"\(torch==[^"]*\)".*/\1/p' pyproject.toml)

.DEFAULT_GOAL := help
.PHONY: help join test sim venv proto swarm clean

help:
	@echo 'make join [PEERS=ADDR,ADDR] [TIER=auto|0..3] [DATA="PATH ..."] [PRESET=tiny|small] [STATE=DIR] [ARGS="..."]'
	@echo '                 install if necessary, then train: without PEERS, found a run or resume the one in STATE'
	@echo 'make test        install if necessary, then lint, check types and import rules, and run all tests'
	@echo 'make sim [SEEDS=200]'
	@echo '                 simulate so many swarms under faults in virtual time; prints how to repeat each that fails'
	@echo 'make venv        only install, with what the tests need'
	@echo 'make swarm       train with four nodes on this machine for two minutes, kill two, and report'
	@echo 'make proto       generate the Python modules of the .proto files again'
	@echo 'make clean       remove caches and build results, but not $(VENV)'

join: $(VENV)/.installed-node
	$(NODE) join $(if $(PEERS),--peers "$(PEERS)") $(if $(TIER),--tier "$(TIER)") \
	    $(foreach path,$(DATA),--data "$(path)") $(if $(PRESET),--preset "$(PRESET)") \
	    $(if $(STATE),--state-dir "$(STATE)") $(ARGS)

test: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/pytest -n 2 --dist worksteal # a file's daemon then starts in one worker, and neither idles at the end

sim: $(VENV)/.installed-node
	$(BIN)/python benchmarks/sim.py --seeds $(SEEDS) --jobs $(shell nproc 2>/dev/null || echo 1)

venv: $(VENV)/.installed-dev

swarm: $(VENV)/.installed-node
	$(NODE) swarm --nodes 4 --tiers 0,1,2,3 --seconds 120 --kill 2 --json

proto: $(VENV)/.installed-dev
	PYTHON="$(abspath $(BIN)/python)" sh scripts/proto.sh

clean:
	rm -rf build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache .grimp_cache
	find . -name __pycache__ -type d -not -path './$(VENV)/*' -prune -exec rm -rf {} +

# A stamp is newer than pyproject.toml when everything it names is installed.
$(VENV)/.installed-torch: pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "braniac-node needs Python 3.11 or newer: name one, as in make join PYTHON=python3.12")'
	$(PYTHON) -m venv "$(VENV)"
	$(BIN)/python -m pip install "$(TORCH)"
	@touch $@

$(VENV)/.installed-node: $(VENV)/.installed-torch pyproject.toml
	$(BIN)/python -m pip install --quiet --editable .
	@touch $@

$(VENV)/.installed-dev: $(VENV)/.installed-torch pyproject.toml
	$(BIN)/python -m pip install --quiet --editable '.[dev]'
	@touch $@ $(VENV)/.installed-node
