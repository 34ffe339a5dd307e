# make demo, make test: everything is set up in .venv on the first run.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
SOURCES := pyproject.toml CMakeLists.txt constraints.txt $(shell find csrc -type f)

.PHONY: demo test systems bench bench-distributed gpu-check bench-gpu lint format clean

demo: $(VENV)/ready
	$(BIN)/python -m dlcore demo $(ARGS)

# Two processes take a file each; a thread that has nothing to do leaves its core to the other process.
test: $(VENV)/ready
	env OMP_WAIT_POLICY=passive $(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder $(ARGS)

# The systems of the literature, trained on the demo's text.
systems: $(VENV)/ready
	$(BIN)/python -m bench.systems $(ARGS)

bench: $(VENV)/ready
	$(BIN)/python -m bench.run $(ARGS)

# Every kernel for GPUs, compiled without one: registers, spills, shared memory.
gpu-check: $(VENV)/ready
	env -u TRITON_INTERPRET $(BIN)/python -m dlcore.triton.check $(ARGS)

bench-gpu: $(VENV)/ready
	$(BIN)/python -m bench.gpu $(ARGS)

# What two ranks on this machine send and take, over a vocabulary, a context and a cache.
bench-distributed: $(VENV)/ready
	env OMP_NUM_THREADS=1 $(BIN)/python -m torch.distributed.run --standalone --nproc-per-node 2 -m bench.distributed $(ARGS)

lint: $(VENV)/lint-ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	find csrc tests -name '*.cpp' -o -name '*.h' -o -name '*.cu' | xargs $(BIN)/clang-format --dry-run -Werror

format: $(VENV)/lint-ready
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	find csrc tests -name '*.cpp' -o -name '*.h' -o -name '*.cu' | xargs $(BIN)/clang-format -i

clean:
	rm -rf $(VENV) build out

$(BIN)/python:
	$(PYTHON) -m venv $(VENV) || { echo "dlcore needs Python's venv module (Debian: python3-venv)" >&2; exit 1; }

$(VENV)/ready: $(BIN)/python $(SOURCES)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[demo,test]'
	touch $@

$(VENV)/lint-ready: $(VENV)/ready
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt ruff mypy clang-format
	touch $@
