# `make demo` and `make test` create .venv first if it does not exist.
PYTHON ?= python3
VENV := .venv
INSTALLED := $(VENV)/.installed
SPREAD := -n 2 --dist loadfile --no-loadscope-reorder  # files in the order of tests/conftest.py

.PHONY: demo check test test-slow lint install clean

demo: $(INSTALLED)
	@examples/quickstart.sh

check: lint
	$(VENV)/bin/python -m pytest -q $(SPREAD) -m "not gpu and not slow and not integration"

test: $(INSTALLED)
	$(VENV)/bin/python -m pytest -q $(SPREAD) -m "not gpu and not slow"

test-slow: $(INSTALLED)
	$(VENV)/bin/python -m pytest -q $(SPREAD) -m "slow and not gpu"

lint: $(INSTALLED)
	$(VENV)/bin/ruff check . && $(VENV)/bin/ruff format --check .

install: $(INSTALLED)

$(INSTALLED): setup.py constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "error: Python 3.11 or later is needed: make PYTHON=python3.11 ..." >&2; exit 1; }
	@echo "installing into $(VENV): a few minutes the first time"
	@$(PYTHON) -m venv $(VENV)
	@$(VENV)/bin/python -m pip install --quiet --constraint constraints.txt --editable '.[test]'
	@touch $@

clean:
	rm -rf $(VENV) build *.egg-info
