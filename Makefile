# `make demo` and `make test` set everything up by themselves; nothing outside this folder is touched.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
# Processes that run the tests, a gigabyte or two each.
JOBS ?= 2

.PHONY: demo test lint bench soak least clean

$(READY): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -q -c constraints.txt -e '.[test,tensorboard]'
	touch $@

demo: $(READY)  ## adapt and distil the bundled model to ten bundled pictures, within ten minutes on two CPU cores
	$(BIN)/unidad train --preset avatars-demo --target bundled:toonHead --out runs/demo --resume
	@echo "Open runs/demo/report.html; the pictures are in runs/demo/grid.png, the generator in runs/demo/student"

test: $(READY) lint  ## lint, types and tests; JOBS=4 for more processes
	$(BIN)/python -m pytest -n $(JOBS) --dist loadfile

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: $(READY)  ## the long preset on toonHead and bottts; draws held-out pictures first (needs node and npm); two hours on two CPU cores
	$(BIN)/python benchmarks/avatarshift.py

soak: $(READY)  ## the long tests: random kills and whatever else takes minutes
	$(BIN)/python -m pytest -m slow -rP

least:  ## a quick part of the tests with the least versions that are allowed, in .venv-least; TORCH=2.13.0 for another torch
	sh scripts/least_versions.sh

clean:
	rm -rf $(VENV) .venv-least build dist *.egg-info
