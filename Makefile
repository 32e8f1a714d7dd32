# Everything from nothing: each target makes .venv and installs what it needs.
PYTHON ?= $(shell command -v python3.11 || command -v python3.12 || command -v python3)
PIP = .venv/bin/python -m pip install --quiet --disable-pip-version-check
HH ?=

.PHONY: demo test lint docs clean

# Train a small reward model on generated pairs (or on HH=path/to/pairs.jsonl), export it, score with the export and draw a report.
demo: .venv/.base
	.venv/bin/python -m demo.run $(if $(HH),--hh=$(HH))

test: lint
	.venv/bin/python -m pytest -q -n auto --maxprocesses=4 --dist=loadfile

lint: .venv/.test
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .

# A site of the Markdown pages: build/docs/docs/index.html.
docs: .venv/.docs
	.venv/bin/sphinx-build -W --keep-going -q -c docs . build/docs

.venv/.base: setup.cfg constraints.txt
	$(PYTHON) -m venv .venv
	$(PIP) --constraint constraints.txt --editable .[report]
	touch $@

# torch, for the parity tests only, comes first and in this version: others would bring other builds of it.
.venv/.test: .venv/.base
	$(PIP) --constraint constraints.txt torch==2.13.0
	$(PIP) --constraint constraints.txt --editable .[test]
	touch $@

.venv/.docs: .venv/.base
	$(PIP) --constraint constraints.txt --editable .[docs]
	touch $@

clean:
	rm -rf .venv demo_run build .pytest_cache .ruff_cache
