# One command for each thing a developer does. All of them set up .venv first.

PYTHON ?= python3
BIN := .venv/bin
READY := .venv/.ready
FRAMEWORKS := .venv-integrations
# torchtitan asks for an older datasets than TRL does; its clip needs no more than these. timm brings
# a torchvision for another torch, and where transformers sees timm it looks for that one.
WITHOUT_DEPENDENCIES := torchtitan==0.3.0 spmd_types==0.2.3 tyro==1.0.17 docstring_parser==0.18.0
APART := timm==1.0.31
# What the backend takes beside the pinned one; tests/test_triton_oldest.py compiles with what is there.
OLDEST_TRITON := .venv/triton-3.6
TRITONS := $(OLDEST_TRITON) .venv/triton-3.7 .venv/triton-3.8
NATIVE := $(shell find csrc tests/emulator tests/values.h -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh')

.PHONY: demo test tritons test-integrations bench gpu sanitize fuzz soak lint types format clean

# Threads that wait sleep: on a busy machine those that spin take the processor from the thread that
# they wait for.
demo: $(READY)
	OMP_WAIT_POLICY=passive $(BIN)/python -m fusedclip demo

# Two at a time, a file each: many tests are processes of their own, of one thread. In the order of
# tests/conftest.py, the longest first.
test: lint types $(OLDEST_TRITON)/triton
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

# The frameworks, each trained for real, in an environment of their own.
test-integrations: $(FRAMEWORKS)/.ready
	$(FRAMEWORKS)/bin/python -m pytest tests/integrations

bench: $(READY)
	$(BIN)/python -m bench.everything

# With the Python that is there, offline: it has a torch that sees the GPU. ONLY=figures and the like:
# see tests/on_gpu.py.
RESULTS ?= build/gpu
gpu:
	$(PYTHON) -m tests.on_gpu --results $(RESULTS) $(if $(ONLY),--only $(ONLY))

# Minutes each; the suite has short versions.
sanitize: $(READY)
	$(BIN)/python -m tests.sanitizers

fuzz: $(READY)
	$(BIN)/python -W ignore -m tests.fuzz --seconds 600
	$(BIN)/python -W ignore -m tests.fuzz --seconds 600 --backend cuda

soak: $(READY)
	$(BIN)/python -m tests.soak
	$(BIN)/python -m tests.distributed.endings --jobs 200 --at-once 4

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run -Werror $(NATIVE)

types: $(READY)
	$(BIN)/mypy

format: $(READY)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(NATIVE)

# Without build isolation: the objects of the last build are found again and reused.
$(READY): pyproject.toml setup.py constraints.txt $(NATIVE)
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/pip install -q -c constraints.txt setuptools pybind11 ninja apache-tvm-ffi torch
	FUSEDCLIP_REQUIRE_NATIVE=1 $(BIN)/pip install -q -c constraints.txt --no-build-isolation -e '.[test,demo,bench]'
	touch $@

.venv/triton-%/triton: | $(READY)
	$(BIN)/pip install -q --no-deps --target .venv/triton-$* triton==$*.0

# Some minutes of compiling each.
tritons: $(TRITONS:%=%/triton)
	$(BIN)/python -m pytest tests/test_triton_oldest.py

# torch first, so that no framework chooses it.
$(FRAMEWORKS)/.ready: pyproject.toml setup.py constraints.txt $(NATIVE)
	test -x $(FRAMEWORKS)/bin/python || $(PYTHON) -m venv $(FRAMEWORKS)
	$(FRAMEWORKS)/bin/pip install -q -c constraints.txt setuptools pybind11 ninja apache-tvm-ffi torch
	FUSEDCLIP_REQUIRE_NATIVE=1 $(FRAMEWORKS)/bin/pip install -q -c constraints.txt \
		--no-build-isolation -e '.[integrations]' hypothesis pytest pytest-timeout
	$(FRAMEWORKS)/bin/pip install -q --no-deps $(WITHOUT_DEPENDENCIES)
	$(FRAMEWORKS)/bin/pip install -q --no-deps --upgrade --target $(FRAMEWORKS)/apart $(APART)
	touch $@

clean:
	rm -rf build dist *.egg-info fusedclip/_C*.so .venv $(FRAMEWORKS)
