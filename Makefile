# One command per habit; every one of them first makes .venv complete where it is not.
# The words after ?= can be set on the command line: make demo DEMO_ARGS=--help, make PYTHON=python3.12

PYTHON ?= $(shell for python in python3 python3.12 python3.11 python3.10; do \
	$$python -c 'import sys; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 12))' 2>/dev/null \
	&& echo $$python && break; done)
VENV := .venv/bin
CPP_FILES = $(wildcard csrc/*.cpp csrc/*.h csrc/*/*.cpp csrc/*/*.h csrc/*/*.cu csrc/*/*.cuh)
DEMO_ARGS ?=
TEST_ARGS ?=

.PHONY: help setup demo test test-gpu lint format clean

help:
	@echo 'make setup     make .venv: pinned packages, mmcv and the extension compiled (Linux, Python 3.10-3.12)'
	@echo 'make demo      train and evaluate in Detectron2, MMDetection and MMSegmentation (DEMO_ARGS=...)'
	@echo 'make test      run the tests (TEST_ARGS=...)'
	@echo 'make test-gpu  run the tests; those that need CUDA fail where there is none'
	@echo 'make lint      check style and types, change nothing'
	@echo 'make format    put Python and C++ files into shape'
	@echo 'make clean     remove build products and caches; .venv, data and results stay'

setup:
	@if [ -z "$(PYTHON)" ]; then echo 'Python 3.10, 3.11 or 3.12 is needed and none was found as' \
		'python3, python3.12, python3.11 or python3.10: install one, or name it with PYTHON=...' >&2; \
		exit 1; fi
	@$(PYTHON) tools/setup_env.py

demo: setup
	$(VENV)/python -m demo.run $(DEMO_ARGS)

test: setup
	$(VENV)/python -m pytest -q $(TEST_ARGS)

test-gpu: setup
	FAIL_WITHOUT_CUDA=1 $(VENV)/python -m pytest -q $(TEST_ARGS)

lint: setup
	$(VENV)/ruff check .
	$(VENV)/ruff format --check .
	$(VENV)/clang-format --dry-run -Werror $(CPP_FILES)
	$(VENV)/mypy

format: setup
	$(VENV)/ruff check --fix .
	$(VENV)/ruff format .
	$(VENV)/clang-format -i $(CPP_FILES)

clean:
	rm -rf build dist *.egg-info elsa_core/_C*.so .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -not -path './.venv/*' -prune -exec rm -rf {} +
