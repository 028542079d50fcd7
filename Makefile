# Every target sets up what it needs in .venv: a fresh machine has Python 3.10 or newer, make and a C++ compiler.

PYTHON ?= python3
VENV ?= .venv
# Any release from 2.11 on will do; this range is the one that was tested (2026-11).
TORCH ?= torch>=2.11,<2.14
# The rest of pyproject.toml's [build-system], with the reasons there.
BUILD_TOOLS := "setuptools>=77,<86" "ninja>=1.11,<2" "pybind11>=3.0,<4"
BIN := $(VENV)/$(if $(filter Windows_NT,$(OS)),Scripts,bin)
RUN := $(BIN)/python -m

.PHONY: demo test bench lint format sanitize release-check wheels gpu clean

# One stamp a set of packages; a change of the build or of the native sources installs again.
SOURCES := pyproject.toml setup.py safnet_ops/schemas.txt $(wildcard build_tools/*.py csrc/*.cpp csrc/*.h csrc/*/*.cpp csrc/*/*.h csrc/*/*.cu csrc/*/*.cuh)

$(VENV)/tools.stamp:
	$(PYTHON) -m venv $(VENV)
	$(RUN) pip install --quiet --upgrade pip
	$(RUN) pip install --quiet "$(TORCH)" $(BUILD_TOOLS)
	touch $@

$(VENV)/run.stamp: $(VENV)/tools.stamp $(SOURCES)
	$(RUN) pip install --quiet --no-build-isolation -e .
	touch $@

$(VENV)/dev.stamp: $(VENV)/run.stamp
	$(RUN) pip install --quiet --no-build-isolation -e ".[dev]"
	touch $@

demo: $(VENV)/run.stamp
	@mkdir -p demo
	$(BIN)/safnet fuse examples/bracket -o demo/fused.exr --preview demo/preview.png --inspect demo/steps --overwrite
	@echo "The HDR picture is demo/fused.exr, a picture to look at demo/preview.png, and how it was made demo/steps/sheet.png"

$(VENV)/docs.stamp: $(VENV)/run.stamp
	$(RUN) pip install --quiet --no-build-isolation -e ".[docs]"
	touch $@

# The site, with a page for each document and the reference from docstrings, into build/site. Warnings are errors.
.PHONY: docs
docs: $(VENV)/docs.stamp
	NO_MKDOCS_2_WARNING=1 $(RUN) mkdocs build --strict

test: $(VENV)/dev.stamp
	$(RUN) pytest -m "not slow"

# The Triton kernels' tests under one release of Triton, e.g. TRITON=3.9.0, in an environment of its own. Nothing is compiled
# but kernels. Triton is installed last: a release of torch asks for one of its own, which is what this is to replace.
TRITON ?= 3.5.0
TRITON_VENV = .venv-triton-$(TRITON)

.venv-triton-%/stamp:
	$(PYTHON) -m venv $(@D)
	$(@D)/bin/python -m pip install --quiet "$(TORCH)" "numpy>=1.26,<3" "pytest>=8.3,<10" "hypothesis>=6.120,<7"
	$(@D)/bin/python -m pip install --quiet "triton==$*"
	touch $@

.PHONY: test-triton
test-triton: $(TRITON_VENV)/stamp
	$(TRITON_VENV)/bin/python -m pytest -m "not slow" tests/safnet_ops/triton ptxsim/tests/test_triton.py

# The CPU kernels under AddressSanitizer and UBSan: any finding ends the run. Left out are tests that compile, which would run
# a compiler under them, and gradcheck and opcheck, which call the same kernels on the same shapes thousands of times more; and
# test_onnx, whose runtimes load libraries in a way (RTLD_DEEPBIND) that sanitizers refuse; and test_library, of processes that only load. -s lets the finding through.
SANITIZED := build/sanitized
LIBASAN := $(shell $(CXX) -print-file-name=libasan.so)
LIBUBSAN := $(shell $(CXX) -print-file-name=libubsan.so)

sanitize: $(VENV)/dev.stamp
ifeq ($(filter /%,$(LIBASAN)),)
	@echo "make sanitize: $(CXX) has no libasan.so (it comes with GCC): nothing was sanitized"; test -z "$$CI"
else
	CXX=$(CXX) SAFNET_OPS_SANITIZE=1 FORCE_CUDA=0 $(BIN)/python setup.py --quiet build_py --build-lib $(SANITIZED) build_ext --build-lib $(SANITIZED)
	LD_PRELOAD="$(LIBASAN) $(LIBUBSAN)" ASAN_OPTIONS=detect_leaks=0 $(RUN) pytest -s -o pythonpath="$(SANITIZED) ." tests/safnet_ops --ignore=tests/safnet_ops/cuda --ignore=tests/safnet_ops/triton \
		--ignore=tests/safnet_ops/test_onnx.py --ignore=tests/safnet_ops/test_library.py -m "not slow" -k "not compile and not export and not gradcheck and not opcheck"
endif

bench: $(VENV)/dev.stamp
	$(RUN) pip install --quiet -e ".[bench]" --no-build-isolation
	$(RUN) pytest bench

NATIVE := $(wildcard csrc/*.cpp csrc/*.h csrc/*/*.cpp csrc/*/*.h csrc/*/*.cu csrc/*/*.cuh simulated_gpu/*.cpp examples/cpp/*.cpp)

lint: $(VENV)/dev.stamp
	$(BIN)/clang-format --dry-run -Werror $(NATIVE)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(RUN) mypy

# sdist -> wheel from that sdist -> a new virtual environment elsewhere -> one fusion; the files end in dist/.
release-check: $(VENV)/dev.stamp
	$(RUN) tools.check_release --torch "$(TORCH)"

# manylinux wheels for every Python, into dist/; needs Docker or Podman on Linux. docs/internals/releasing.md says more.
wheels: $(VENV)/dev.stamp
	$(RUN) pip install --quiet "cibuildwheel>=3,<5"
	$(RUN) cibuildwheel --output-dir dist

# For editors and clang tools; compiles nothing.
compile_commands.json: $(VENV)/tools.stamp $(SOURCES)
	$(BIN)/python setup.py --quiet compile_commands

format: $(VENV)/dev.stamp
	$(BIN)/clang-format -i $(NATIVE)
	$(BIN)/ruff format .

# On a machine with a GPU, with the Python, torch and nvcc that are there; needs no network and makes no .venv.
gpu:
	$(PYTHON) -m tools.gpu $(GPU_OPTIONS)

clean:
	rm -rf $(VENV) .venv-triton-* build dist demo compile_commands.json safnet_ops/*.so safnet_ops/build_report.json
