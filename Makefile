# make demo    simulate a small data set and refine it        make lint       ruff and mypy
# make test    lint and the tests that take seconds           make bench      benchmarks on a CPU, at most 5 minutes
# make test-all  also the slow tests and those for a GPU      make bench-gpu  benchmarks on a GPU

PYTHON ?= python3
BIN := .venv/bin
# Named by what it is made from: a changed lock makes a new environment, an unchanged one costs nothing.
ENV := .venv/ready-$(shell cat requirements.lock pyproject.toml | cksum | cut -d' ' -f1)
PYTEST := NUMBA_NUM_THREADS=2 OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 -ra

.PHONY: help env demo test test-all lint bench bench-gpu clean

help:
	@sed -n 's/^# \{0,1\}//p' Makefile | head -3

env: $(ENV)

$(ENV):
	$(PYTHON) -m venv .venv
	$(BIN)/pip install -q -r requirements.lock
	$(BIN)/pip install -q --no-deps --no-build-isolation -e .
	@rm -f .venv/ready-*
	@touch $@

demo: $(ENV)
	$(BIN)/verglas simulate --model demo --n 500 --box 48 --pixel 4 --snr 0.3 --out demo/data --overwrite
	$(BIN)/verglas refine --particles demo/data/particles.star --reference demo/data/start.mrc \
		--diameter 150 --initial-resolution 40 --out demo/refine --overwrite
	@echo
	@echo "The map is demo/refine/run_class001.mrc (the truth: demo/data/truth.mrc)."
	@echo "Open demo/refine/report.html in a browser for the report."

lint: $(ENV)
	$(BIN)/ruff check .
	$(BIN)/mypy

test: lint
	$(PYTEST) -m "not slow and not gpu"
	@$(BIN)/python -m benchmarks stamp "make test"

test-all: lint
	$(PYTEST)
	@$(BIN)/python -m benchmarks stamp "make test-all"

bench: $(ENV)
	$(BIN)/python -m benchmarks cpu

bench-gpu: $(ENV)
	$(BIN)/python -m benchmarks gpu

clean:
	rm -rf demo build dist .mypy_cache .ruff_cache .pytest_cache .hypothesis
