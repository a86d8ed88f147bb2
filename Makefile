# Every target does all of its own set-up: an environment, torch, what the job needs, the build. What
# was done is remembered by stamps, so that a second run starts at once.
#
#   PYTHON=python3     the Python (>= 3.10) to start from
#   TORCH=...          a version or a pip requirement of torch, installed into .venv

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
MAKEFLAGS += --no-print-directory

PYTHON ?= python3
TORCH ?=
WORDS ?=
PYTEST_ARGS ?=
BENCH_ARGS ?=

# The active environment's Python if it has torch >= 2.10 (and TORCH is not given), else .venv's.
PY := $(or $(shell $(PYTHON) scripts/find_python.py "$(TORCH)" 2> /dev/null),.venv/bin/python)
# A bare version is a requirement too.
TORCH_SPEC := $(or $(TORCH),torch==2.13.0)
TORCH_SPEC := $(if $(shell echo "$(TORCH_SPEC)" | grep -E '^[0-9]'),torch==$(TORCH_SPEC),$(TORCH_SPEC))

# Stamps go with the environment that they speak of: removed with .venv, apart for any other.
ifeq ($(PY),.venv/bin/python)
  STAMPS := .venv/.stamps
  BASE := .venv/pyvenv.cfg
else
  STAMPS := .stamps/$(subst /,_,$(PY))
  BASE := $(wildcard $(dir $(PY))../pyvenv.cfg)
endif
TORCH_STAMP := $(STAMPS)/torch-$(shell echo "$(TORCH_SPEC)" | tr '<>' 'lg' | tr -c 'a-zA-Z0-9.\n' '_')
export PATH := $(dir $(abspath $(PY))):$(PATH)

PIP := $(PY) -m pip --disable-pip-version-check install --quiet
CMAKE_DIR = build/cmake-$(shell $(PY) -c 'import sys; print(sys.implementation.cache_tag)')
BUILD_INPUTS := CMakeLists.txt setup.py pyproject.toml encdec_fast/_version.py \
                $(shell find cmake csrc 2> /dev/null)
CPP_FILES = $(shell find csrc tests/cpp -name '*.h' -o -name '*.cpp' -o -name '*.cu' -o -name '*.cuh')
# The allocator keeps its pages, for every contender: the harder condition for this library.
BENCH_ENV := MALLOC_MMAP_THRESHOLD_=8589934592 MALLOC_TRIM_THRESHOLD_=17179869184 \
             MALLOC_TOP_PAD_=268435456

.PHONY: help
help: ## Say what there is to make
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 18

.PHONY: demo
demo: $(STAMPS)/built $(STAMPS)/req-demo $(STAMPS)/req-demo-data ## Pronounce WORDS="..." and 5,000 dictionary words
	$(PY) -m examples.demo $(WORDS)

.PHONY: test
test: $(STAMPS)/built $(STAMPS)/req-test $(STAMPS)/req-demo-data $(STAMPS)/qemu $(STAMPS)/triton-oldest/.done ## Run the C++ and Python tests, in several processes (PYTEST_ARGS="-n 0 ...": in one)
	flock $(CMAKE_DIR)/lock cmake --build $(CMAKE_DIR) --target cpp_tests cuda_kernels
	ctest --test-dir $(CMAKE_DIR) --output-on-failure --parallel 2
	ENCDEC_FAST_REQUIRE_NATIVE=1 ENCDEC_FAST_OLDEST_TRITON=$(abspath $(STAMPS)/triton-oldest) \
	    $(PY) -m pytest -n auto --maxprocesses 4 $(PYTEST_ARGS)

.PHONY: test-sanitize
test-sanitize: $(STAMPS)/req-build ## Run the C++ tests under AddressSanitizer and UBSan
	cmake -S . -B build/sanitize -G Ninja -DENCDEC_BUILD_PYTHON=OFF -DENCDEC_SANITIZE=ON
	cmake --build build/sanitize --target cpp_tests
	ctest --test-dir build/sanitize --output-on-failure --parallel 2

.PHONY: lint
lint: $(TORCH_STAMP) $(STAMPS)/req-lint ## Check style, types and layers
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy
	clang-format --dry-run -Werror $(CPP_FILES)
	lint-imports

.PHONY: triton-report
triton-report: $(STAMPS)/built $(STAMPS)/req-test ## Compile the Triton kernels for GPUs that need not be here (REPORT_ARGS="--candidates")
	$(PY) -m encdec_fast.triton_kernels.report $(REPORT_ARGS)

.PHONY: gpu-check
gpu-check: $(STAMPS)/built $(STAMPS)/req-bench ## On a machine with a GPU: are the Triton kernels right, and how fast (BENCH_ARGS="...")
	$(PY) -m benchmarks.gpu_check $(BENCH_ARGS)

.PHONY: gpu-tune
gpu-tune: $(STAMPS)/built $(STAMPS)/req-bench ## On a machine with a GPU: find the fastest tiles for it (BENCH_ARGS="...")
	$(PY) -m benchmarks.gpu_tune $(BENCH_ARGS)

.PHONY: bench-rnn
bench-rnn: $(STAMPS)/built $(STAMPS)/req-bench ## Measure LSTM, GRU and RNN beside their peers (BENCH_ARGS="...")
	$(BENCH_ENV) $(PY) -m benchmarks.report rnn $(BENCH_ARGS)

.PHONY: bench-attention bench-bridge bench-generation bench-linear bench-transformer
bench-attention bench-bridge bench-generation bench-linear bench-transformer: bench-%: $(STAMPS)/built $(STAMPS)/req-bench
	$(BENCH_ENV) $(PY) -m benchmarks.report $* $(BENCH_ARGS)
bench-generation: $(STAMPS)/req-demo-data
bench-attention: ## Measure additive and scaled dot-product attention beside torch
bench-bridge: ## Measure the attention decoder and the bridges beside torch
bench-transformer: ## Measure a Transformer's encoder beside torch
bench-generation: ## Measure generation beside transformers, CTranslate2 and torch loops
bench-linear: ## Measure linear on packed weights beside torch

.PHONY: build
build: $(STAMPS)/built ## Build and install in place (pip install -e .)

.PHONY: wheel
wheel: $(TORCH_STAMP) $(STAMPS)/req-build $(STAMPS)/req-wheel ## Build the CPU wheel into dist/
	$(PY) scripts/wheel.py cpu

.PHONY: wheel-cuda
wheel-cuda: nvcc $(TORCH_STAMP) $(STAMPS)/req-build $(STAMPS)/req-wheel ## Build the CUDA wheel into dist/: needs nvcc, but no GPU and no CUDA torch
	$(PY) scripts/wheel.py cuda

.PHONY: wheel-test
wheel-test: wheel build/abi-2.10.0/.done build/abi-2.13.0/.done ## Try the wheels of dist/ beside the oldest and the newest torch (downloads GBs once)
	$(PY) scripts/wheel.py test build/abi-2.10.0/bin/python build/abi-2.13.0/bin/python

.PHONY: check-abi
check-abi: nvcc $(STAMPS)/built build/abi-2.11.0/.done ## Load the libraries, CUDA's too, in a CUDA build of torch 2.11 (downloads GBs once)
	flock $(CMAKE_DIR)/lock cmake --build $(CMAKE_DIR) --target cuda_kernels
	build/abi-2.11.0/bin/python scripts/check_abi.py $(CMAKE_DIR)/libencdec_ops_cuda.so

.PHONY: nvcc
nvcc:
	@command -v "$${CUDACXX:-nvcc}" > /dev/null || { echo "There is no nvcc in PATH or CUDACXX: install the CUDA toolkit (13.0 is what is tested)" >&2; exit 1; }

.PHONY: clean
clean: ## Remove what was built, not the environment
	rm -rf build dist encdec_fast/lib encdec_fast/_C*.so *.egg-info $(STAMPS)/built

.PHONY: FORCE
FORCE:

.venv/pyvenv.cfg:
	@command -v $(PYTHON) > /dev/null || { echo "There is no $(PYTHON): install Python >= 3.10, or say make PYTHON=..." >&2; exit 1; }
	@$(PYTHON) scripts/find_python.py > /dev/null
	$(PYTHON) -m venv .venv

# Only .venv's torch is ours to install; another one in it makes this stamp stale.
$(TORCH_STAMP): $(BASE)
	@mkdir -p $(STAMPS) && rm -f $(STAMPS)/torch-*
	$(if $(filter .venv/%,$(PY)),$(PIP) "$(TORCH_SPEC)")
	@touch $@

$(STAMPS)/req-demo-data: requirements/demo-data.txt $(BASE)
	@mkdir -p $(STAMPS)
	$(PIP) --no-deps -r $<
	@touch $@

$(STAMPS)/req-%: requirements/%.txt $(BASE)
	@mkdir -p $(STAMPS)
	$(PIP) -r $<
	@touch $@

# Beside the environment, which has a newer one: the kernels must compile with both.
$(STAMPS)/triton-oldest/.done: $(STAMPS)/req-test
	$(PIP) --target $(@D) --upgrade --no-deps triton==3.6.0
	@touch $@

# An environment with one torch, as the package index gives it, and NumPy.
build/abi-%/.done: $(BASE)
	$(PY) -m venv $(@D)
	$(@D)/bin/python -m pip --disable-pip-version-check install --quiet torch==$* numpy
	@touch $@

$(STAMPS)/qemu: $(BASE)
	@mkdir -p $(STAMPS)
	@scripts/try_qemu.sh
	@touch $@

# Built anew, too, where somebody has removed the result.
$(STAMPS)/built: $(BUILD_INPUTS) $(TORCH_STAMP) $(STAMPS)/req-build \
                 $(if $(wildcard encdec_fast/lib/libencdec_core.so),,FORCE)
	$(PIP) --no-build-isolation --no-deps -e .
	@touch $@
