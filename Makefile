# Everything runs in .venv, made with plain venv and pip. PYTHON picks the interpreter (3.10 or newer).
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
OUT ?= runs/gpu
WORKERS ?= 2

.PHONY: models train test test-all check bench results gpu traffic codegen emulate flight clean
.DEFAULT_GOAL := test

$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $@

train: $(VENV)/.installed  ## the main job: the same network with torch.nn's layers and with ours
	$(BIN)/fastnorm train

test: $(VENV)/.installed  ## the suite, without what is marked slow
	$(BIN)/pytest -n $(WORKERS) --dist loadgroup -m "not slow"

test-all: $(VENV)/.installed  ## the whole suite
	$(BIN)/pytest -n $(WORKERS) --dist loadgroup

check: $(VENV)/.installed  ## style, types, tests
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(MAKE) test

bench: $(VENV)/.installed  ## every operation's time against torch.nn, torch.compile and peers
	$(BIN)/fastnorm bench

results: $(VENV)/.installed  ## README's results and bench/results/cpu.md, from bench/results
	$(BIN)/python bench/render.py

traffic: $(VENV)/.installed  ## bytes moved by every operation, over the minimum
	$(BIN)/python bench/traffic.py --out bench/results/traffic.md

models: $(VENV)/.installed  ## launches and bytes of whole models, before and after convert
	$(BIN)/python bench/models.py --out bench/results/models.md

codegen: $(VENV)/.installed  ## registers, spills and vector widths of every kernel, on every target
	$(BIN)/python bench/codegen.py --out bench/results/codegen.md

emulate: $(VENV)/.installed  ## compiled kernels held to the contract of verify, their PTX emulated
	PYTHONPATH=bench $(BIN)/python -m emulate --out bench/results/emulated.md
	PYTHONPATH=bench $(BIN)/python -m emulate --liger --out bench/results/emulated-liger.md

flight: $(VENV)/.installed  ## how near to a copy's speed each kernel comes, by a model of its machine code
	$(BIN)/python bench/flight.py --out bench/results/flight.md

# A GPU's machine may be offline and has a torch of its own: the interpreter as it is, if no .venv is.
# OPTIONS: e.g. "--steps tests --pack tests.tar.gz"; all in one takes less than ten minutes.
gpu:  ## on a machine with a GPU: gpu tests, verify, bench, compute-sanitizer; results in OUT
	$(if $(wildcard $(VENV)/.installed),$(BIN)/python,$(PYTHON)) bench/gpu.py --out $(OUT) $(OPTIONS)

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache
