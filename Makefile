# `make demo` installs and shows the whole path; `make test` installs and runs the tests. Both work on a fresh machine.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin

.PHONY: demo test install lint widgets clean

demo: $(VENV)/.installed
	$(BIN)/mistudio demo

test: $(VENV)/.installed-dev
	$(BIN)/python -m pytest

install: $(VENV)/.installed

lint: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

# The constraints pin what was tested; the package itself keeps its ranges open.
$(VENV)/.installed: pyproject.toml constraints.txt | $(VENV)/bin/python
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[all]"
	touch $@

$(VENV)/.installed-dev: pyproject.toml constraints.txt | $(VENV)/bin/python
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[all,dev]"
	touch $@ $(VENV)/.installed

# Only for people who change the widgets: the built files are committed.
widgets:
	cd mistudio_widgets && npm ci && npm run build

clean:
	rm -rf $(VENV) build dist *.egg-info
