# `make check` is what CI runs, in the environment that is active. Everything else is a part of it.
PYTHON ?= python
BENCHMARKS := $(filter-out $(wildcard benchmarks/_*.py),$(wildcard benchmarks/*.py))

.PHONY: help install test lint format docs bench-tiny check

help:  ## show this list
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

install:  ## install fedsea, editable, with everything that development needs
	$(PYTHON) -m pip install "torch>=2.9,<2.14" -e ".[dev]"

test:  ## run all tests
	$(PYTHON) -m pytest

lint:  ## style, types, import rules, house rules
	$(PYTHON) -m ruff check .
	$(PYTHON) -m ruff format --check .
	$(PYTHON) -m mypy
	lint-imports
	$(PYTHON) scripts/check_source.py

format:  ## rewrite the files as the style wants them
	$(PYTHON) -m ruff check --fix .
	$(PYTHON) -m ruff format .

docs:  ## write the generated parts of docs/reference again
	$(PYTHON) scripts/make_reference.py

bench-tiny:  ## run every benchmark at its smallest size
	@for script in $(BENCHMARKS); do echo "--- $$script"; $(PYTHON) $$script --tiny || exit 1; done

check:  ## everything that CI checks
	.ci/run --here
