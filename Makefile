# nitro-signer: `make run` shows it working, `make test` runs what CI runs.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check --quiet

.DEFAULT_GOAL := help
.PHONY: help run install test test-again test-vsock test-nitro drill lint format bench bench-kms bench-attested bench-proxy lock clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-12s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
		|| { echo "Python 3.11 or newer is needed; say which with: make PYTHON=python3.12 ..."; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null \
		|| { [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null \
			&& apt-get update -qq && apt-get install -y -qq python3-venv; } \
		|| { echo "The venv module is missing; as root: apt-get install python3-venv"; exit 1; }
	@$(PYTHON) -m venv $(VENV)

$(VENV)/.run: requirements.lock pyproject.toml | $(BIN)/python
	@echo "installing from requirements.lock into $(VENV)"
	@$(PIP) install --require-hashes --requirement requirements.lock
	@$(PIP) install --no-deps --no-build-isolation --no-index --editable .
	@touch $@

$(VENV)/.dev: requirements-dev.lock $(VENV)/.run
	@echo "installing from requirements-dev.lock into $(VENV)"
	@$(PIP) install --require-hashes --requirement requirements-dev.lock
	@touch $@

run: $(VENV)/.run ## start the demo: an enclave process, four keys, the signing API on 127.0.0.1:6732
	@exec $(BIN)/signer demo

install: $(VENV)/.run ## install the signer into .venv, and say where it is
	@echo "installed: $(abspath $(BIN)/signer)"

FAILED := .pytest_cache/v/cache/lastfailed
AGAIN := $(MAKE) --no-print-directory test-again

test: $(VENV)/.dev ## run every test with warnings as errors, and measure branch coverage
	@$(BIN)/python -m coverage erase
	@rm -f $(FAILED)
	@$(BIN)/python -m coverage run -m pytest --numprocesses auto --dist loadfile --no-loadscope-reorder $(ARGS) \
		|| { [ $$? = 1 ] && $(AGAIN); }
	@$(BIN)/python -m coverage combine --quiet
	@$(BIN)/python -m coverage report --fail-under=93

# Thousands of tests with real clocks meet a pause of the machine now and then: what failed is run once more, alone, and
# named. The drill is not: what it finds by chance is a race.
test-again: $(VENV)/.dev
	@test -s $(FAILED) && ! grep -q test_drill $(FAILED)
	@echo "once more, alone:" && cat $(FAILED)
	@$(BIN)/python -m coverage run -m pytest --last-failed --last-failed-no-failures none
	@echo "these tests failed once, and passed alone: they depend on how busy the machine is. Mend them."

# Runs a command in a small guest whose kernel has AF_VSOCK with a loopback.
VSOCK_GUEST ?= ../shared/tools/vsock-guest

test-vsock: $(VENV)/.dev ## run the tests that need AF_VSOCK, in a guest that has it
	@if [ ! -x "$(VSOCK_GUEST)" ]; then \
		echo "tests over AF_VSOCK left out: there is no $(VSOCK_GUEST) (make VSOCK_GUEST=... test-vsock)"; \
		exit 0; \
	fi; \
	"$(VSOCK_GUEST)" -t 600 $(BIN)/python -m pytest -p no:cacheprovider tests/vsock; status=$$?; \
	if [ $$status = 125 ]; then echo "tests over AF_VSOCK left out: the guest did not start"; exit 0; fi; \
	exit $$status

# Runs a command in an emulated Nitro Enclave. Its first use builds the emulator, some six minutes.
NITRO_GUEST ?= ../shared/tools/nitro-guest

test-nitro: $(VENV)/.dev ## run our image, and a drill with the enclave program, in an emulated Nitro Enclave
	@if [ ! -x "$(NITRO_GUEST)" ]; then \
		echo "drill in an emulated enclave left out: there is no $(NITRO_GUEST) (make NITRO_GUEST=... test-nitro)"; \
		exit 0; \
	fi; \
	"$(NITRO_GUEST)" -- true; status=$$?; \
	if [ $$status = 125 ]; then echo "drill in an emulated enclave left out: the enclave did not start"; exit 0; fi; \
	[ $$status = 0 ] || exit $$status; \
	NITRO_GUEST="$(abspath $(NITRO_GUEST))" $(BIN)/python -m pytest -p no:cacheprovider tests/nitro

lint: $(VENV)/.dev ## format, lint, types, import contracts
	@$(BIN)/ruff format --check .
	@$(BIN)/ruff check .
	@$(BIN)/mypy
	@$(BIN)/lint-imports

format: $(VENV)/.dev ## rewrite the sources in the project's format
	@$(BIN)/ruff format .
	@$(BIN)/ruff check --fix .

bench: $(VENV)/.dev ## measure signing against its floor (raw signing plus raw durable write)
	@$(BIN)/python -m tests.bench

bench-kms: $(VENV)/.dev ## measure keys in KMS against plain boto3 asking the same server (ARGS=--help)
	@$(BIN)/python -m tests.bench.kms $(ARGS)

bench-attested: $(VENV)/.dev ## measure how soon keys sealed by KMS are there (ARGS=--help)
	@$(BIN)/python -m tests.bench.attested $(ARGS)

bench-proxy: $(VENV)/.dev ## measure the proxy against a direct connection (ARGS=--help)
	@$(BIN)/python -m tests.bench.proxy $(ARGS)

drill: $(VENV)/.dev ## break everything around a signer under load, and check what must hold (ARGS=--help)
	@$(BIN)/python -m tests.drill $(ARGS)

lock: ## write both lock files anew (needs uv)
	uv pip compile --universal --exclude-newer 2026-11-01 --python-version 3.11 --generate-hashes --no-emit-index-url \
		--no-emit-find-links --no-header pyproject.toml --group build -o requirements.lock
	uv pip compile --universal --exclude-newer 2026-11-01 --python-version 3.11 --generate-hashes --no-emit-index-url \
		--no-emit-find-links --no-header pyproject.toml --group build --group dev \
		-c requirements.lock -o requirements-dev.lock

clean: ## remove what the targets above made, the demo's keys too
	rm -rf $(VENV) .demo .mypy_cache .ruff_cache .pytest_cache .hypothesis .coverage .coverage.*
