# Dovetail. The two commands: `make serve` and `make test`. Both set themselves up, with the versions that constraints.txt pins.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := pip install -q --disable-pip-version-check
PROJECTS := core plugins/worker_torch plugins/models_torch plugins/models_transformers plugins/attention_cpu plugins/attention_cuda plugins/matmul_cpu plugins/matmul_cuda plugins/quant_fp8 plugins/quant_int8 plugins/quant_awq_gptq plugins/quant_compressed_tensors plugins/quantize plugins/prefix_cache plugins/spec_ngram plugins/spec_draft plugins/server_openai plugins/bench plugins/demo_model
# Not in the default set: installed for the tests alone, through the root's extra `dev`.
TEST_PROJECTS := kit plugins/attention_flashinfer plugins/attention_pallas
MODEL ?= demo
PORT ?= 8000

.PHONY: serve test test-real test-newest lint lock soak interop compat bench gpu-wheels gpu-flashinfer gpu-pack gpu-first gpu-check clean
.DEFAULT_GOAL := help

help:
	@echo "make serve   serve the demo model on 127.0.0.1:$(PORT)   (MODEL=… PORT=…)"
	@echo "make test    lint, types, architecture and all tests that need nothing but this repository"
	@echo "make test-real    tests with other libraries, in environments of their own"
	@echo "make test-newest  the tests with the newest version of every dependency: reports what breaks, fails nothing"
	@echo "make lint    lint, types and architecture"
	@echo "make lock    choose the newest versions of all dependencies and pin them in constraints.txt"
	@echo "make soak    the long tests; results go to benchmarks/results"
	@echo "make gpu-pack    what a machine with a GPU and no network needs, in .gpu (benchmarks/gpu/README.md)"
	@echo "make gpu-first   what is run first on a machine with a GPU; make gpu-check is the rest"
	@echo "make interop gptqmodel and transformers read what dovetail quantize writes, in an environment of their own"
	@echo "make compat  the tests of the bridge with every version of transformers that was tried, each in an environment of its own"
	@echo "make bench   the benchmarks of the README"

serve: $(VENV)/.serve
	@$(BIN)/dovetail serve $(MODEL) --port $(PORT)

# Two at a time: threads that spin while they wait would take the other's core.
test: lint
	OMP_WAIT_POLICY=passive $(BIN)/pytest -n 2 --dist worksteal

lint: $(VENV)/.test
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

# FlashInfer's Python part is tested over emulated kernels; the bridge, with the versions of transformers that are not installed.
test-real: $(VENV)/.test build/flashinfer/site/.made interop
	OMP_WAIT_POLICY=passive $(BIN)/pytest -n 2 --dist worksteal -m real --ignore plugins/attention_flashinfer
	PYTHONPATH=build/flashinfer/site OMP_WAIT_POLICY=passive $(BIN)/pytest -n 2 -m real plugins/attention_flashinfer
	$(BIN)/python tests/compat.py --others

test-newest: $(VENV)/.test
	$(BIN)/python tests/newest.py

lock: $(VENV)/.serve
	$(BIN)/python tests/lock.py

soak: $(VENV)/.test
	$(BIN)/python tests/soak.py

compat: $(VENV)/.test
	$(BIN)/python tests/compat.py

# Too heavy, and too much of it built from source, for every run of the tests.
interop: $(VENV)/.test $(VENV)-interop/.made
	$(BIN)/python tests/interop/ours.py --theirs $(VENV)-interop/bin/python

$(VENV)-interop/.made: tests/interop/constraints.txt tests/interop/requirements.txt
	@test -x $(@D)/bin/python || $(PYTHON) -m venv $(@D)
	@$(@D)/bin/$(PIP) -c $< torch setuptools wheel numpy packaging ninja
	@BUILD_CUDA_EXT=0 $(@D)/bin/$(PIP) -c $< --no-build-isolation -r tests/interop/requirements.txt
	@touch $@

bench: $(VENV)/.test
	$(BIN)/python benchmarks/transformers_side_by_side.py
	$(BIN)/python benchmarks/over_http.py
	$(BIN)/python benchmarks/host_time.py
	$(BIN)/python benchmarks/start_up.py
	$(BIN)/python benchmarks/linear_cpu.py
	$(BIN)/python benchmarks/attention_cpu.py
	$(BIN)/python benchmarks/bridge_compile.py
	$(BIN)/python benchmarks/speculation.py
	$(BIN)/python benchmarks/quantization_quality.py

# What the engine needs, from the projects' own files; torch is the CPU build that constraints.txt pins.
$(VENV)/.serve: constraints.txt pyproject.toml $(PROJECTS:%=%/pyproject.toml)
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "installing (the first time takes a minute or two: torch is large)"
	@$(BIN)/$(PIP) -c constraints.txt hatchling editables
	@$(BIN)/$(PIP) -c constraints.txt --no-build-isolation $(PROJECTS:%=-e %) -e .
	@touch $@

$(VENV)/.test: $(VENV)/.serve $(TEST_PROJECTS:%=%/pyproject.toml)
	@$(BIN)/$(PIP) -c constraints.txt --no-build-isolation $(TEST_PROJECTS:%=-e %) -e '.[dev]'
	@touch $@

# Where packages can be had: all that a machine with a GPU and no network needs, and its size. See benchmarks/gpu/README.md.
gpu-pack: gpu-wheels
	$(BIN)/python benchmarks/gpu/pack.py

# The demo model stays here: its weights are the largest of all packages, and no check reads them.
gpu-wheels: $(VENV)/.test
	rm -rf .gpu/wheels
	$(BIN)/pip wheel -q --disable-pip-version-check --no-deps --no-build-isolation -w .gpu/wheels \
		$(patsubst %,./%,$(filter-out plugins/demo_model,$(PROJECTS))) ./kit ./plugins/attention_flashinfer
	$(BIN)/pip download -q --disable-pip-version-check --no-deps --only-binary=:all: --python-version 3.12 --implementation cp \
		--platform manylinux_2_28_x86_64 --platform manylinux_2_27_x86_64 --platform manylinux_2_17_x86_64 \
		--platform manylinux2014_x86_64 -d .gpu/wheels -r benchmarks/gpu/requirements.txt

# FlashInfer's kernels for that machine: minutes each, once.
gpu-flashinfer: build/flashinfer/site/.made
	PATH=$(CURDIR)/build/flashinfer/site/bin:$$PATH PYTHONPATH=build/flashinfer/site $(BIN)/python benchmarks/gpu/aot_flashinfer.py

build/flashinfer/site/.made: benchmarks/gpu/flashinfer.txt $(VENV)/.test
	$(BIN)/$(PIP) --no-deps --upgrade --target $(@D) -r benchmarks/gpu/flashinfer.txt
	@touch $@

# There. Need nothing but the wheels and that machine's python3.
gpu-first:
	$(PYTHON) benchmarks/gpu/first.py

gpu-check:
	$(PYTHON) benchmarks/gpu/check.py $(PART) $(if $(AGAIN),--again)

clean:
	rm -rf $(VENV) $(VENV)-interop .compat .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache
