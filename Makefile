# Everything needs only Python >= 3.11 and make. `make help` lists the targets.
.DEFAULT_GOAL := help
SHELL := /bin/sh

# The first interpreter that runs and is new enough; a name on the PATH may be a shim that does not run.
NEW_ENOUGH := -c 'import sys; sys.exit(sys.version_info < (3, 11))'
PYTHON ?= $(shell for p in python3 python3.13 python3.12 python3.11 python; do \
	$$p $(NEW_ENOUGH) 2>/dev/null && echo $$p && break; done)
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
ARGS ?=
PART ?=
# Two at a time: each worker has servers of its own.
PYTEST_ARGS ?= -n 2
DOCKER ?= docker
VERSION := $(shell sed -n 's/^version = "\(.*\)"/\1/p' pyproject.toml)
IMAGE ?= agentcore-tools:$(VERSION)

# Its scripts name its folder and its Python: where either is another by now, they do not run, or run the code of another
# checkout. A link is somebody's wish, and what was not made by venv says nothing.
MADE_BY := $(VENV)/pyvenv.cfg
UNFIT := $(shell test ! -e $(VENV) -o -L $(VENV) || { test -x $(BIN)/python && \
	{ ! grep -q "^command = " $(MADE_BY) || grep -qF " $(CURDIR)/$(VENV)" $(MADE_BY); }; } || echo unfit)
ifneq ($(UNFIT),)
.PHONY: $(READY)
endif

$(READY): requirements/dev.txt pyproject.toml
	@test -n "$(PYTHON)" && $(PYTHON) $(NEW_ENOUGH) 2>/dev/null || \
		{ echo "No Python >= 3.11 found. Install one, or name it: make PYTHON=/path/to/python3" >&2; exit 1; }
	@# One that an interrupt left without pip, an older Python made, or that stood elsewhere, is made anew.
	@test -z "$(UNFIT)" && $(BIN)/python $(NEW_ENOUGH) 2>/dev/null && $(BIN)/python -m pip --version >/dev/null 2>&1 || \
		{ rm -rf $(VENV); $(PYTHON) -m venv $(VENV) || \
		{ echo "This Python cannot make virtual environments; on Debian: apt install python3-venv" >&2; exit 1; }; }
	@echo "Installing the locked packages into $(VENV) (a minute or two, once)"
	@$(BIN)/python -m pip install --quiet --quiet --disable-pip-version-check --require-hashes --no-deps -r requirements/dev.txt
	@$(BIN)/python -m pip install --quiet --quiet --disable-pip-version-check --no-deps --no-build-isolation --editable .
	@touch $(READY)

.PHONY: setup
setup: $(READY)  ## make .venv with the locked packages and the project
	@echo "Ready: $(BIN)/agentcore-tools"

.PHONY: run
run: $(READY)  ## start the service on http://127.0.0.1:8001 (ARGS="--port 8002")
	@exec $(BIN)/agentcore-tools serve $(ARGS)

.PHONY: test
test: $(READY)  ## run every test against real servers that it starts itself (PYTEST_ARGS="-k jsonrpc")
	@$(BIN)/python -m pytest $(PYTEST_ARGS)

.PHONY: conformance
conformance: $(READY)  ## the official MCP suite at both eras (needs npm; says so when it could not be had)
	@$(BIN)/python -m tests.mcp_conformance.run

.PHONY: check
check: $(READY)  ## format, lint, types, import floors
	@$(BIN)/ruff format --check .
	@$(BIN)/ruff check .
	@$(BIN)/mypy
	@$(BIN)/python -m pytest -q tests/test_house.py

.PHONY: fix
fix: $(READY)  ## format, and mend what lint can mend by itself
	@$(BIN)/ruff format .
	@$(BIN)/ruff check --fix .

.PHONY: load
load: $(READY)  ## headless Locust, against HOST=... or a service of its own (SCENARIO, USERS, RATE, DURATION)
	@$(BIN)/python -m load.run $(if $(SCENARIO),--scenario $(SCENARIO)) $(if $(HOST),--host $(HOST)) \
		$(if $(USERS),--users $(USERS)) $(if $(RATE),--spawn-rate $(RATE)) \
		$(if $(DURATION),--run-time $(DURATION)) $(ARGS)

.PHONY: report
report: $(READY)  ## the origin's tables with our figures, in Markdown (ARGS="--seconds 10" is a short form)
	@$(BIN)/python -m load.tables $(ARGS)

.PHONY: bench
bench: $(READY)  ## the benchmark suite and its comparison with the baseline, 12 minutes (PART=wire,peers; ARGS="--rounds 1")
	@$(BIN)/python -m load.bench $(PART) $(ARGS)

.PHONY: overhead
overhead: $(READY)  ## what a call costs by stage, and docs/images/overhead.svg (DATABASE_URL, REDIS_URL: else embedded)
	@$(BIN)/python -m load.overhead $(ARGS)

.PHONY: profilers
profilers: $(READY)  ## py-spy and memray into .venv, for docs/profiling.md
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --require-hashes --no-deps -r requirements/profiling.txt

CLIENTS := $(patsubst requirements/clients/%.txt,%,$(wildcard requirements/clients/*.txt))

.PHONY: clients
clients: $(READY) $(CLIENTS:%=$(VENV)/clients/%/.ready)  ## the client libraries of docs/clients.md, for their tests

$(VENV)/clients/%/.ready: requirements/clients/%.txt
	@echo "Installing $* into $(@D)"
	@rm -rf $(@D) && $(BIN)/python -m venv $(@D)
	@$(@D)/bin/python -m pip install --quiet --quiet --disable-pip-version-check --require-hashes --no-deps -r $<
	@touch $@

.PHONY: image
image:  ## build the container image (IMAGE=name:tag; needs a Docker engine)
	@DOCKER_BUILDKIT=1 $(DOCKER) build --build-arg VERSION=$(VERSION) --tag $(IMAGE) \
		--build-arg REVISION=$$(git rev-parse HEAD 2>/dev/null || echo unknown) $(ARGS) .

.PHONY: audit
audit: $(READY)  ## known vulnerabilities of the image's packages; fails when it could not look at all of them
	@.ci/supply-chain audit

.PHONY: sbom
sbom: $(READY)  ## the image's packages for programs (CycloneDX), in dist/sbom.cdx.json
	@.ci/supply-chain sbom

.PHONY: lock
lock:  ## write requirements/*.txt anew from pyproject.toml (needs uv)
	@uv pip compile --quiet --universal --python-version 3.11 --generate-hashes --no-header pyproject.toml \
		-o requirements/runtime.txt
	@uv pip compile --quiet --universal --python-version 3.11 --generate-hashes --no-header pyproject.toml \
		--extra load --group dev -c requirements/runtime.txt -o requirements/dev.txt
	@for group in build audit peers profiling; do uv pip compile --quiet --universal --python-version 3.11 --generate-hashes \
		--no-header --group $$group -c requirements/dev.txt -o requirements/$$group.txt; done
	@uv pip compile --quiet --universal --python-version 3.11 --generate-hashes --no-header --group checkov \
		-o requirements/checkov.txt
	@for client in $(CLIENTS); do uv pip compile --quiet --universal --python-version 3.11 --generate-hashes \
		--no-header --group client-$$client -o requirements/clients/$$client.txt; done

.PHONY: clean
clean:  ## remove the environment and every cache
	@rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache .hypothesis

.PHONY: help
help:  ## this list
	@awk -F ':.*  ## ' '/^[a-z]+:.*  ## / { printf "  make %-12s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)
