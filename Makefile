# make demo   set up .venv and run the main job: teacher, student, evaluation, report
# make test   set up .venv with the test tools and run the default tests
# make slow   the long proofs: kill -9, several processes, the whole demo, the built wheel
# make lint   ruff and mypy      make bench   the throughput ladder      make clean   remove .venv and caches
#
# PYTHON=python3.12 make test          chooses the interpreter that .venv is made of
# make test ARGS='tests/test_cli.py'   passes on arguments of pytest

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt

.DEFAULT_GOAL := help
.PHONY: help demo test slow lint bench clean

help:
	@sed -n '/^#/!q; s/^# \{0,1\}//p' Makefile

demo: $(VENV)/installed
	$(BIN)/diffstill demo

# Each worker gets one thread: OpenMP threads of several processes on the same cores slow each other down twentyfold.
test: $(VENV)/installed-dev
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 $(ARGS)

slow: $(VENV)/installed-dev
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m slow -n 2 $(ARGS)

lint: $(VENV)/installed-dev
	$(BIN)/ruff check .
	$(BIN)/mypy

bench: $(VENV)/installed
	$(BIN)/python benchmarks/throughput.py

clean:
	rm -rf $(VENV) build dist src/*.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# The files whose time stamps tell that .venv is up to date; a changed pyproject.toml or constraints.txt installs anew.
$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/installed: $(VENV)/bin/python pyproject.toml constraints.txt
	$(INSTALL) -e .
	@touch $@

# Without torchvision, that has to fit the torch in use: the one file of torch-fidelity that is used needs torch alone.
$(VENV)/installed-dev: $(VENV)/bin/python pyproject.toml constraints.txt
	$(INSTALL) -e '.[dev]'
	$(INSTALL) --no-deps torch-fidelity
	@touch $@ $(VENV)/installed
