# make demo | test | test-all | bench | docs | wheel | lint | sanitize | fuzz | build | clean
#
# The first target that you ask for makes .venv, installs the pinned tools and builds the extension; after that, only what
# changed is done again. PYTHON chooses the interpreter that .venv is made with.

PYTHON ?= python3
TORCH ?= torch==2.13.0
VENV := .venv
PY := $(VENV)/bin/python
PIP := $(PY) -m pip --disable-pip-version-check

CXX_FILES = $(shell find csrc bench tests -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh')
BUILD_INPUTS := $(shell find csrc cmake -type f) CMakeLists.txt setup.py

# Stamps live in .venv, so that they go when it goes.
TOOLS := $(VENV)/.tools-installed
BUILT := $(VENV)/.seqkern-built

.PHONY: demo test test-all bench docs wheel lint sanitize fuzz build clean
.DELETE_ON_ERROR:

demo: $(BUILT)
	$(PY) -m seqkern demo

# Two runs side by side, since most tests keep one core busy. The emulated device is built by the first of its tests, so
# these are in one run.
test: $(BUILT)
	$(PY) -m pytest -q -m "not slow" tests/test_[a-k]*.py & \
	$(PY) -m pytest -q -m "not slow" -p no:cacheprovider tests/test_[l-z]*.py; status=$$?; wait $$! && exit $$status

test-all: $(BUILT)
	$(PY) -m pytest -q
	$(MAKE) sanitize

# Wrong arguments to every compiled operator, for as many minutes, from another seed each day.
MINUTES ?= 60
fuzz: $(BUILT)
	$(PY) tests/fuzz_operators.py --minutes $(MINUTES) --seed $$(date +%Y%m%d) | tail -n 3

bench: $(BUILT)
	$(PY) -m pytest -q bench --benchmark
	$(PY) -m bench.report

# The site, in build/site.
docs: $(TOOLS)
	$(PIP) install --quiet --require-hashes --no-deps -r requirements/docs.txt
	NO_MKDOCS_2_WARNING=1 $(PY) -m mkdocs build --strict

# One wheel for this Python and every torch in WHEEL_TORCHES, and the sdist, in dist. Of a torch only what it takes to
# compile and link is kept. The wheel's tag says which glibc it needs; torch's libraries are not copied into it.
WHEEL_TORCHES ?= 2.11.0 2.12.1 2.13.0 2.14.1 2.15.0
TORCH_FOLDERS = $(WHEEL_TORCHES:%=build/torch/%)
empty :=
space := $(empty) $(empty)
wheel: $(TOOLS) $(TORCH_FOLDERS)
	$(PIP) install --quiet --require-hashes --no-deps -r requirements/wheel.txt
	rm -rf dist build/wheel build/lib.*
	SEQKERN_TORCHES=$(subst $(space),:,$(abspath $(TORCH_FOLDERS))) \
		$(PY) -m build --no-isolation --wheel --outdir build/wheel .
	$(PY) -m build --no-isolation --sdist .
	PATH=$(abspath $(VENV)/bin):$$PATH $(PY) -m auditwheel repair --wheel-dir dist \
		--exclude 'libtorch*' --exclude 'libc10*' --exclude 'libgomp*' build/wheel/*.whl

TORCH_PARTS := torch/(include/.*|lib/lib(c10|torch_cpu|torch_python|gomp)\.so.*|__init__\.py|version\.py)
build/torch/%: | $(TOOLS)
	$(PIP) download --quiet --no-deps --only-binary :all: --dest $@.download torch==$*
	$(PY) -c "import re, sys, zipfile; wheel = zipfile.ZipFile(sys.argv[1]); \
		wheel.extractall('$@.part', [n for n in wheel.namelist() if re.fullmatch(r'$(TORCH_PARTS)', n)])" $@.download/*.whl
	rm -r $@.download
	mv $@.part $@

lint: $(TOOLS)
	$(VENV)/bin/ruff check
	$(VENV)/bin/ruff format --check
	$(VENV)/bin/clang-format --dry-run -Werror $(CXX_FILES)
	$(VENV)/bin/mypy

build: $(BUILT)

$(PY):
	$(PYTHON) -m venv $(VENV)

# Everything by its hash but torch, whose file differs by platform. `pip check` finds what the list has not.
$(TOOLS): requirements/dev.txt pyproject.toml | $(PY)
	$(PIP) install --quiet --require-hashes --no-deps -r requirements/dev.txt
	$(PIP) install --quiet $(TORCH)
	SEQKERN_EXTENSION=off $(PIP) install --quiet --no-build-isolation --no-deps -e .
	$(PIP) check
	touch $@

$(BUILT): $(TOOLS) $(BUILD_INPUTS)
	$(PIP) install --quiet --no-build-isolation --no-deps -e .
	touch $@

# ---- The kernels under sanitizers --------------------------------------------------------------------------------------
# A copy of the package gets a sanitized extension; Python itself is not sanitized, so the runtime comes by LD_PRELOAD
# (with libstdc++, or the sanitizer misses C++ exceptions), and leaks, which would be Python's, are not looked for.
#   make sanitize                     AddressSanitizer and UndefinedBehaviorSanitizer
#   make sanitize SANITIZER=thread    ThreadSanitizer; addresses where they always are (setarch -R), as it wants them

SANITIZER ?= address,undefined
SANITIZE := build/sanitize-$(SANITIZER)
ifeq ($(SANITIZER),thread)
SANITIZED_TESTS := tests/test_threads.py tests/test_lstm.py tests/test_gru.py tests/test_lengths.py tests/test_packed.py \
	tests/test_variants.py::test_one_thread_and_two tests/test_regularisers.py tests/test_attention.py \
	tests/test_additive_attention.py tests/test_attention_decoder.py tests/test_crf.py
SANITIZER_RUNTIME := libtsan.so
SANITIZER_LAUNCH := setarch -R
SANITIZER_DESELECT := --deselect tests/test_threads.py::test_dataloader_workers  # it does not follow a fork
else
SANITIZED_TESTS := tests/test_rnn.py tests/test_lstm.py tests/test_gru.py tests/test_cells.py tests/test_lengths.py \
	tests/test_packed.py tests/test_inputs.py tests/test_kernels.py tests/test_threads.py tests/test_attention.py \
	tests/test_multi_head_attention.py tests/test_additive_attention.py tests/test_attention_decoder.py \
	tests/test_fuzz.py tests/test_crf.py tests/test_variants.py tests/test_cuda.py tests/test_cuda_on_cpu.py \
	tests/test_cuda_variants.py
SANITIZER_RUNTIME := libasan.so
endif

sanitize: $(BUILT)
	rm -rf $(SANITIZE)/tree && mkdir -p $(SANITIZE)/tree
	cp -r seqkern tests pyproject.toml $(SANITIZE)/tree
	rm -f $(SANITIZE)/tree/seqkern/*.so
	$(VENV)/bin/cmake -S . -B $(SANITIZE)/cmake -G Ninja -DPython_EXECUTABLE=$(abspath $(PY)) \
		-DCMAKE_MAKE_PROGRAM=$(abspath $(VENV)/bin/ninja) -DSEQKERN_SANITIZE=$(SANITIZER) -DSEQKERN_CUDA=OFF \
		-DSEQKERN_OUTPUT_DIR=$(abspath $(SANITIZE)/tree/seqkern)
	$(VENV)/bin/cmake --build $(SANITIZE)/cmake --target _C cuda_on_cpu cuda_on_cpu_selftest
	cd $(SANITIZE)/tree && \
		export LD_PRELOAD="$$(c++ -print-file-name=$(SANITIZER_RUNTIME)) $$(c++ -print-file-name=libstdc++.so)" && \
		export ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1 && \
		export TSAN_OPTIONS="halt_on_error=1 exitcode=66 ignore_noninstrumented_modules=1" && \
		export SEQKERN_CUDA_ON_CPU=$(abspath $(SANITIZE)/cmake/tests/cuda_on_cpu) && \
		$(SANITIZER_LAUNCH) $(abspath $(PY)) -c "import seqkern; assert seqkern.info().build.get('sanitize'), seqkern.info()" && \
		$(SANITIZER_LAUNCH) $(abspath $(PY)) -m pytest -q -x -m "not slow" -p no:cacheprovider $(SANITIZER_DESELECT) \
			$(SANITIZED_TESTS)

clean:
	rm -rf build dist *.egg-info seqkern/*.so .pytest_cache .ruff_cache .mypy_cache .hypothesis .benchmarks $(BUILT)
	find seqkern tests bench -name __pycache__ -type d -prune -exec rm -rf {} + 2>/dev/null || true
