# One command per habit; every one of them first makes .venv complete where it is not.
# The words after ?= can be set on the command line: make demo DEMO_ARGS=--help, make PYTHON=python3.12

PYTHON ?= $(shell for python in python3 python3.13 python3.12 python3.11 python3.10; do \
	$$python -c 'import sys; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 13))' 2>/dev/null \
	&& echo $$python && break; done)
VENV := .venv/bin
ASAN := build/asan
EMULATION := tests/cuda_emulation
# The frameworks' thousands of files are compiled to bytecode once, not in each process.
export PYTHONDONTWRITEBYTECODE :=
CPP_FILES = $(wildcard csrc/*.cpp csrc/*.h csrc/*/*.cpp csrc/*/*.h csrc/*/*.cu csrc/*/*.cuh \
	$(EMULATION)/*.cpp $(EMULATION)/*.h $(EMULATION)/include/*.h $(EMULATION)/include/*.cuh)
DEMO_ARGS ?=
TEST_ARGS ?=
# Two test files at a time, in the order of their names: those with few but long tests not last.
TWO_FILES := -n 2 --dist loadfile --no-loadscope-reorder
ZOO_ARGS ?=
BENCH_ARGS ?=
FUZZ_ARGS ?=
ENV_ARGS ?=
WHEEL_ARGS ?=
WHEEL_PYTHON ?= $(or $(wildcard $(VENV)/python),$(PYTHON))

.PHONY: help setup pins demo test test-fast test-gpu test-asan test-environments test-aarch64 fuzz wheel bench lint format zoo clean

help:
	@echo 'make setup     make .venv: pinned packages, mmcv and the extension compiled (Linux, Python 3.10-3.13)'
	@echo 'make pins      move requirements.txt to the newest versions, with their hashes'
	@echo 'make demo      train and evaluate in Detectron2, MMDetection and MMSegmentation (DEMO_ARGS=...)'
	@echo 'make test      run the tests (TEST_ARGS=...)'
	@echo 'make test-fast run the tests that take no time, in 3 minutes'
	@echo 'make test-gpu  run the tests; those that need CUDA fail where there is none'
	@echo 'make test-asan run the operator tests with AddressSanitizer'
	@echo 'make test-environments  run the guides in fresh environments of many versions (ENV_ARGS=--help)'
	@echo 'make test-aarch64  build the wheel for aarch64 and test it in emulation (TEST_ARGS=...)'
	@echo 'make fuzz      feed random input to parts of the project (FUZZ_ARGS=--help)'
	@echo 'make wheel     build wheel and source distribution in dist, as published (WHEEL_ARGS=--help; WHEEL_PYTHON=... has torch)'
	@echo 'make bench     measure operator, backbone and detector (BENCH_ARGS="--device cuda")'
	@echo 'make lint      check style and types, change nothing'
	@echo 'make format    put Python and C++ files into shape'
	@echo 'make zoo       make MODEL_ZOO.md from the metafiles and the models (ZOO_ARGS=--check compares)'
	@echo 'make clean     remove build products and caches; .venv, data and results stay'

setup:
	@if [ -z "$(PYTHON)" ]; then echo 'Python 3.10 to 3.13 is needed and none was found as' \
		'python3, python3.13, python3.12, python3.11 or python3.10: install one, or name it with PYTHON=...' >&2; \
		exit 1; fi
	@$(PYTHON) tools/setup_env.py

# Set-up is for one platform, so its marker goes without saying.
pins:
	$(VENV)/uv lock -q --upgrade --directory tools/pins
	{ printf '# Made by `make pins` from tools/pins/pyproject.toml. Do not edit.\n\n' && \
		$(VENV)/uv export -q --directory tools/pins --frozen --no-header --no-annotate | sed \
		"s/python_full_version/python_version/; s/ ; platform_machine == 'x86_64'.*linux'//; \
		s/ and platform_machine == 'x86_64'.*linux'//"; } > requirements.new
	mv requirements.new requirements.txt

demo: setup
	$(VENV)/python -m examples.digits.demo $(DEMO_ARGS)

test: setup
	$(VENV)/python -m pytest -q $(TWO_FILES) $(TEST_ARGS)

test-fast: setup
	$(VENV)/python -m pytest -q $(TWO_FILES) -m "not slow" $(TEST_ARGS)

test-gpu: setup
	@grep -q nv_fatbin elsa_core/_C.so || FORCE_CUDA=1 $(VENV)/python setup.py build_ext --inplace --force
	FAIL_WITHOUT_CUDA=1 $(VENV)/python -m pytest -q $(TEST_ARGS)

# A build of its own in build/asan, so that the sanitizer never reaches the installed extension. Its
# checks are calls and leave out the stack, or the compiler takes many minutes.
ASAN_FLAGS := -fsanitize=address -fno-omit-frame-pointer --param asan-stack=0 \
	--param asan-instrumentation-with-call-threshold=0
test-asan: setup
	FORCE_CUDA=0 CFLAGS='$(ASAN_FLAGS)' LDFLAGS=-fsanitize=address \
		$(VENV)/python setup.py -q build_ext --build-lib $(ASAN) --build-temp $(ASAN)/temp
	cp elsa_core/*.py $(ASAN)/elsa_core/
	cd $(ASAN) && ASAN_OPTIONS=detect_leaks=0 \
		LD_PRELOAD="$$(c++ -print-file-name=libasan.so) $$(c++ -print-file-name=libstdc++.so)" \
		$(CURDIR)/$(VENV)/python -m pytest -q -p no:cacheprovider -c $(CURDIR)/pyproject.toml \
		$(or $(addprefix $(CURDIR)/,$(TEST_ARGS)),$(wildcard $(CURDIR)/tests/core/test_operator*.py))

wheel:
	$(WHEEL_PYTHON) tools/build_wheel.py $(WHEEL_ARGS)

test-aarch64:
	@$(WHEEL_PYTHON) tools/test_aarch64.py $(TEST_ARGS)

fuzz: setup
	$(VENV)/python tools/fuzz.py $(FUZZ_ARGS)

bench: setup
	$(VENV)/python -m benchmarks.run $(BENCH_ARGS)

lint: setup
	$(VENV)/ruff check .
	$(VENV)/ruff format --check .
	$(VENV)/clang-format --dry-run -Werror $(CPP_FILES)
	$(VENV)/mypy

format: setup
	$(VENV)/ruff check --fix .
	$(VENV)/ruff format .
	$(VENV)/clang-format -i $(CPP_FILES)

zoo: setup
	$(VENV)/python tools/make_zoo.py $(ZOO_ARGS)

test-environments: setup
	@$(VENV)/python tools/test_environments.py $(ENV_ARGS)

clean:
	rm -rf build dist *.egg-info elsa_core/_C*.so .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -not -path './.venv/*' -prune -exec rm -rf {} +
