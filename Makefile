# What one types at a fresh clone. Everything that needs the machine prepared goes through scripts/bootstrap.sh.

SHELL := /bin/bash
PYTHON := .venv/bin/python
JOBS ?= 2
PYTEST_ARGS ?=

export PATH := $(PATH):/usr/sbin:/sbin

.PHONY: help build test lint man docs demo bench bench-quick sanitize sdist dist clean

help:
	@echo "make demo         show fasttun at work between two network namespaces (needs root)"
	@echo "make test         linters, type checks and all tests (root: with network namespaces)"
	@echo "make build        .venv and the extension, ready to use and to change"
	@echo "make lint         ruff, mypy, cython-lint, stubtest"
	@echo "make man          the manual page, from the source of --help: build/man/fasttun.1"
	@echo "make docs         the documentation site: build/site/index.html"
	@echo "make bench        every tunnel side by side; writes the README's table (needs root, takes long)"
	@echo "make bench-quick  the same in short; prints the table, writes nothing but build/"
	@echo "make sanitize     the engine's tests under AddressSanitizer and UndefinedBehaviorSanitizer"
	@echo "make sdist, dist  source distribution; source distribution and wheel, in dist/"
	@echo "make clean        remove what was built (.venv stays)"

build:
	@scripts/bootstrap.sh build

demo:
	@scripts/bootstrap.sh demo
	@$(PYTHON) -m fasttun demo

lint:
	@scripts/bootstrap.sh test
	@scripts/lint.sh

man:
	@scripts/bootstrap.sh build
	@mkdir -p build/man
	@$(PYTHON) -m fasttun.cli.manual > build/man/fasttun.1

# The theme tells of its successor at each start; the variable is its own switch for that.
docs:
	@scripts/bootstrap.sh test
	@NO_MKDOCS_2_WARNING=1 $(PYTHON) -m mkdocs build --quiet --strict

# Tests marked `alone` compare speeds, so they run first, with nothing beside them; those marked `waits` sleep.
# All parts run even after a failure. Status 5 is pytest's for nothing collected.
test:
	@scripts/bootstrap.sh test
	@status=0; \
	scripts/lint.sh || status=1; \
	$(PYTHON) -m pytest -m alone $(PYTEST_ARGS) || [ $$? -eq 5 ] || status=1; \
	$(PYTHON) -m pytest -m waits $(PYTEST_ARGS) & waits=$$!; \
	$(PYTHON) -m pytest -n $(JOBS) --dist worksteal -m "not alone and not waits" $(PYTEST_ARGS) || status=1; \
	wait $$waits || [ $$? -eq 5 ] || status=1; \
	exit $$status

# The loop and its parts (build/bench-loop.json), then the tunnels (bench/results/), the table and the pictures.
bench:
	@scripts/bootstrap.sh bench
	@mkdir -p build
	@$(PYTHON) -m pytest bench --benchmark-enable --benchmark-only --benchmark-json build/bench-loop.json
	@$(PYTHON) -m bench.endtoend
	@$(PYTHON) -m bench.report

bench-quick:
	@scripts/bootstrap.sh bench
	@mkdir -p build
	@$(PYTHON) -m bench.endtoend --quick --output build/bench-quick.json
	@$(PYTHON) -m bench.report --check build/bench-quick.json

sanitize:
	@scripts/bootstrap.sh test
	@scripts/sanitize.sh

sdist:
	@scripts/bootstrap.sh test
	@$(PYTHON) -m build --sdist

dist:
	@scripts/bootstrap.sh test
	@$(PYTHON) -m build

clean:
	rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis .benchmarks fasttun/*.so
	find . -path ./.venv -prune -o -name __pycache__ -type d -prune -exec rm -rf {} +
