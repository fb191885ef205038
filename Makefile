# Two commands do everything on a fresh machine: `make join` trains, `make test` checks. Both make .venv first.

PYTHON ?= python3
VENV   ?= .venv
SECONDS ?= 60
KILLS   ?= 1000
SEEDS  ?= 200
BIN    := $(VENV)/bin
NODE   := $(BIN)/braniac-node

# torch goes in first and by itself: pip then finds the pinned wheel and never weighs another against it.
TORCH  := $(shell sed -n 's/^ *"\(torch==[^"]*\)".*/\1/p' pyproject.toml)

.DEFAULT_GOAL := help
.PHONY: help join test test-containers sim venv proto dashboards swarm up down fuzz durability nightly clean

# What takes hours and is not part of `make test`. Each is a target of its own, so that it can be run alone.
NIGHTLY := sim fuzz durability

help:
	@echo 'make join [PEERS=ADDR,ADDR] [TIER=auto|0..3] [DATA="PATH ..."] [PRESET=tiny|small] [STATE=DIR] [ARGS="..."]'
	@echo '                 install if necessary, then train: without PEERS, found a run or resume the one in STATE'
	@echo 'make test        install if necessary, then lint, check types and import rules, and run all tests'
	@echo 'make sim [SEEDS=200]'
	@echo '                 simulate so many swarms under faults in virtual time; prints how to repeat each that fails'
	@echo 'make venv        only install, with what the tests need'
	@echo 'make swarm       train with four nodes on this machine for two minutes, kill two, and report'
	@echo 'make up          a swarm in containers, see deploy/README.md; with OBSERVE=1 Prometheus and Grafana too'
	@echo 'make down        remove its containers, networks and volumes'
	@echo 'make test-containers   build the images, harm a swarm in containers and judge it; skipped without an engine'
	@echo 'make dashboards  write the dashboards of Grafana again'
	@echo 'make fuzz [SECONDS=60]        fuzz every decoder for so long, one after the other'
	@echo 'make durability [KILLS=1000]  kill a process that saves, again and again, and look for damage'
	@echo 'make nightly     all that takes hours: $(NIGHTLY)'
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

test-containers: $(VENV)/.installed-dev
	PYTHON="$(abspath $(BIN)/python)" scripts/test_containers.sh

sim: $(VENV)/.installed-node
	$(BIN)/python benchmarks/sim.py --seeds $(SEEDS) --jobs $(shell nproc 2>/dev/null || echo 1)

venv: $(VENV)/.installed-dev

swarm: $(VENV)/.installed-node
	$(NODE) swarm --nodes 4 --tiers 0,1,2,3 --seconds 120 --kill 2 --json

fuzz: $(VENV)/.installed-fuzz
	$(BIN)/python -m tests.fuzz.run --seconds $(SECONDS)

durability: $(VENV)/.installed-node
	$(BIN)/python benchmarks/durability.py --kills $(KILLS) --json

nightly: SECONDS = 300
nightly: $(NIGHTLY)

proto: $(VENV)/.installed-dev
	PYTHON="$(abspath $(BIN)/python)" sh scripts/proto.sh

up: $(VENV)/.installed-node
	OBSERVE="$(OBSERVE)" $(BIN)/python -m braniac.node.compose up

down: $(VENV)/.installed-node
	$(BIN)/python -m braniac.node.compose down

dashboards:
	$(PYTHON) scripts/dashboards.py

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

$(VENV)/.installed-fuzz: $(VENV)/.installed-dev
	$(BIN)/python -m pip install --quiet --editable '.[dev,fuzz]'
	@touch $@
