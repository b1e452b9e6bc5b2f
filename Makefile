# One command per habit; every one of them first makes .venv complete where it is not.
# The words after ?= can be set on the command line: make demo DEMO_ARGS=--help, make PYTHON=python3.12

SHELL := bash
.SHELLFLAGS := -o pipefail -c
PYTHON ?= $(shell for python in python3 python3.13 python3.12 python3.11 python3.10; do \
	$$python -c 'import sys; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 13))' 2>/dev/null \
	&& echo $$python && break; done)
VENV := .venv/bin
ASAN := build/asan
EMULATION := tests/cuda_emulation
# The frameworks' thousands of files are compiled to bytecode once, not in each process.
export PYTHONDONTWRITEBYTECODE :=
CPP_FILES = $(wildcard csrc/*.cpp csrc/*.h csrc/*/*.cpp csrc/*/*.h csrc/*/*.cu csrc/*/*.cuh \
	$(EMULATION)/*.cpp $(EMULATION)/*.h $(EMULATION)/include/*.h $(EMULATION)/include/*.cuh tools/gpu/*.cu)
DEMO_ARGS ?=
TEST_ARGS ?=
# Two test files at a time, in the order of their names: those with few but long tests not last.
TWO_FILES := -n 2 --dist loadfile --no-loadscope-reorder
ZOO_ARGS ?=
BENCH_ARGS ?=
FUZZ_ARGS ?=
ENV_ARGS ?=
WHEEL_ARGS ?=
GPU_ARGS ?=
WHEEL_PYTHON ?= $(or $(wildcard $(VENV)/python),$(PYTHON))

.PHONY: help setup pins demo test test-fast test-gpu test-asan test-environments test-aarch64 gpu-check fuzz wheel bench lint format zoo clean

help:
	@echo 'make setup     make .venv: pinned packages, mmcv and the extension compiled (Linux, Python 3.10-3.13)'
	@echo 'make pins      move requirements.txt to the newest versions, with their hashes'
	@echo 'make demo      train and evaluate in Detectron2, MMDetection and MMSegmentation (DEMO_ARGS=...)'
	@echo 'make test      run the tests (TEST_ARGS=...)'
	@echo 'make test-fast run the tests that take no time, in 3 minutes'
	@echo 'make test-gpu  run the tests; those that need CUDA fail where there is none'
	@echo 'make gpu-check check and measure everything on a GPU in 10 minutes (GPU_ARGS="--help", --rehearse needs no GPU)'
	@echo 'make test-asan run the operator tests with AddressSanitizer'
	@echo 'make test-environments  run the guides in fresh environments of many versions (ENV_ARGS=--help)'
	@echo 'make test-aarch64  build the wheel for aarch64 and test it in emulation (TEST_ARGS=...)'
	@echo 'make fuzz      feed random input to parts of the project (FUZZ_ARGS=--help)'
	@echo 'make wheel     build wheel and source distribution in dist, as published (WHEEL_ARGS=--help; WHEEL_PYTHON=... has torch)'
	@echo 'make bench     measure operator, backbone and detector (BENCH_ARGS="--device cuda")'
	@echo 'make lint      check style and types, change nothing'
	@echo 'make format    format Python and C++ files'
	@echo 'make zoo       make MODEL_ZOO.md from the metafiles and the models (ZOO_ARGS=--check compares)'
	@echo 'make clean     remove build products and caches; .venv, data and results stay'

# --- make setup: a step that has succeeded leaves a file in .venv/setup, and is done again when the
# content of what it depends on, in STEP.in, has changed. Two set-ups of one folder wait for each other.

SETUP := .venv/setup
STEPS := packages detectron2 mmcv project extension
COMPILED_WITH := torch\|ninja\|packaging\|pip\|setuptools\|wheel
# Lines of requirements.txt, with their hashes: those of some packages, and without some.
pins = sed -n '/^\($(1)\)==/,/[^\\]$$/p' requirements.txt
IN_packages = sed '/^\(sal-detectron2\|onedl-mmcv\)==/,/[^\\]$$/d' requirements.txt
IN_detectron2 = $(call pins,sal-detectron2) | sed "s/ ; .*'//"
IN_mmcv = $(call pins,onedl-mmcv\|$(COMPILED_WITH)); cat tools/build_mmcv.py
IN_project = $(call pins,$(COMPILED_WITH)); pwd; cat pyproject.toml
IN_extension = $(call pins,$(COMPILED_WITH)); cat setup.py $(filter-out %.md,$(wildcard csrc/*.* csrc/*/*.*))
# Compiling every module of 5 GB of packages takes longer than it will ever save.
INSTALL = PIP_USER=0 $(VENV)/python -m pip --no-input --disable-pip-version-check install --no-deps \
	--no-build-isolation --no-compile
begin = @echo "Set-up, $(1)"
# Shows how far pip is; what it says is in STEP.log, whose end is shown after a failure.
watched = { $(1); } 2>&1 | $(VENV)/python tools/setup_env.py --watch $@.log --total $(2) || \
	{ tail -n 20 $@.log >&2; exit 1; }
# A process of the compiler needs 1.5 GB.
COMPILE = PATH="$(CURDIR)/$(VENV):$$PATH" CXX="$${CXX:-$$(command -v c++ || command -v g++ || \
	command -v clang++)}" MAX_JOBS="$${MAX_JOBS:-$$(awk '/^MemTotal/ {jobs = int($$2 / 1.5e6); \
	print jobs < 1 ? 1 : jobs < cores ? jobs : cores}' cores=$$(nproc) /proc/meminfo)}"

setup:
	@if [ -z "$(PYTHON)" ]; then echo 'Python 3.10 to 3.13 is needed and none was found as' \
		'python3, python3.13, python3.12, python3.11 or python3.10: install one, or name it with PYTHON=...' >&2; \
		exit 1; fi
	@$(VENV)/python -c 'import pip' 2>/dev/null || rm -rf $(SETUP)
	@ls elsa_core/_C*.so >/dev/null 2>&1 || rm -f $(SETUP)/extension
	@flock -n . true || echo 'Waiting for another set-up in this folder to end'
	@flock . $(MAKE) -s --no-print-directory PYTHON='$(PYTHON)' $(SETUP)/verify || { status=$$?; \
		echo 'Set-up stopped. Fix what it says above and repeat the command: it continues' \
		'from that step.' >&2; exit $$status; }

$(SETUP)/venv:
	@$(PYTHON) tools/setup_env.py
	@echo 'Making .venv: a few minutes, about 9 GB'
	$(PYTHON) -m venv --clear .venv
	mkdir -p $(SETUP)
	touch $@

.PHONY: FORCE
$(STEPS:%=$(SETUP)/%.in): $(SETUP)/%.in: FORCE | $(SETUP)/venv
	{ $(IN_$*); } > $@.new
	cmp -s $@.new $@ || cp $@.new $@
	rm $@.new

$(STEPS:%=$(SETUP)/%): $(SETUP)/%: $(SETUP)/%.in
# One after the other.
$(SETUP)/detectron2: | $(SETUP)/packages
$(SETUP)/mmcv: | $(SETUP)/detectron2
$(SETUP)/project: | $(SETUP)/mmcv
$(SETUP)/extension: | $(SETUP)/project

# First what the packages that are published as source are made with. What an attempt that was cut off
# has left is not trusted.
$(SETUP)/packages:
	$(call begin,1 of 6: packages)
	$(call pins,$(COMPILED_WITH)) | sed '/^torch==/,/[^\\]$$/d' > $@.tools
	again=$$(test ! -e $@.begun || echo --ignore-installed); touch $@.begun; \
		$(call watched,$(INSTALL) $$again --require-hashes -r $@.tools && \
		$(INSTALL) $$again --require-hashes -r $@.in,$$(cat $@.tools $@.in | grep -c ==))
	rm $@.begun; touch $@

# A wheel of Python files that is tagged for Python 3.10 alone.
$(SETUP)/detectron2:
	$(call begin,2 of 6: Detectron2)
	$(call watched,$(INSTALL) --require-hashes -r $@.in --only-binary=:all: --python-version 3.10 --upgrade \
		--target "$$($(VENV)/python -c "import sysconfig; print(sysconfig.get_paths()['purelib'])")",1)
	touch $@

$(SETUP)/mmcv:
	$(call begin,3 of 6: mmcv)
	rm -rf $@.wheel
	$(COMPILE) $(VENV)/python tools/build_mmcv.py --out $@.wheel \
		$$($(call pins,onedl-mmcv) | tr -d '\\')
	$(call watched,$(INSTALL) --force-reinstall $@.wheel/*.whl,1)
	touch $@

$(SETUP)/project:
	$(call begin,4 of 6: this project)
	$(call watched,ELSA_BUILD_EXTENSION=0 $(INSTALL) -e .,1)
	touch $@

# Not through pip, which starts from nothing each time: ninja compiles only what changed.
$(SETUP)/extension:
	$(call begin,5 of 6: the extension)
	$(COMPILE) $(VENV)/python -W ignore setup.py -q build_ext --inplace --force 2>&1 | \
		sed -u '/No CUDA runtime is found/d; s/^\(\[[0-9]*.[0-9]*\]\).* -o \([^ ]*\).*/\1 \2/'
	touch $@

$(SETUP)/verify: $(STEPS:%=$(SETUP)/%)
	$(call begin,6 of 6: whether it works)
	$(VENV)/python tools/setup_env.py --verify
	touch $@
	@echo '.venv is ready'

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

gpu-check: setup
	@$(VENV)/python tools/gpu_check.py $(GPU_ARGS)

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
