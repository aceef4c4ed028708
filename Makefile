# `make check` is what CI runs, in the environment that is active. Everything else is a part of it.
PYTHON ?= python

.PHONY: help install test lint format docs bench-tiny check

help:  ## show this list
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

install:  ## install fedsea, editable, with everything that development needs
	$(PYTHON) -m pip install "torch>=2.9,<2.14" -e ".[dev]"

test:  ## run all tests
	$(PYTHON) -m pytest

lint:  ## style, types, import rules, house rules
	.ci/run --here lint types imports source

format:  ## rewrite the files as the style wants them
	$(PYTHON) -m ruff check --fix .
	$(PYTHON) -m ruff format .

docs:  ## write the generated parts of docs/reference again
	$(PYTHON) scripts/make_reference.py
	$(PYTHON) scripts/make_cli_reference.py

bench-tiny:  ## run every benchmark at its smallest size
	.ci/run --here benchmarks

check:  ## everything that CI checks
	.ci/run --here
