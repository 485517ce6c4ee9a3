# `make demo` and `make test` set up everything they need in $(VENV); nothing but Python 3.10+ must be there before.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
DEMO_BASE := $(HOME)/.cache/shardmerge/SmolLM2-135M-Instruct

# Two processes; a file's tests stay together, as they share what is made once.
PARALLEL := -n 2 --dist loadfile

.DEFAULT_GOAL := help
.PHONY: help demo test test-all lint format wheel bench clean

help:
	@echo "make demo      merge an adapter into SmolLM2 and ask base, base + adapter and merged the same questions"
	@echo "make test      the test suite"
	@echo "make test-all  the test suite with its slow part"
	@echo "make lint      ruff, mypy --strict, and the workflow files against their schema"
	@echo "make format    let ruff format the code"
	@echo "make wheel     build the wheel, install it by itself, and try a first merge with it"
	@echo "make bench     time and memory against a durable copy and PEFT, on models of 2 to 16 GB; takes an hour"

$(VENV)/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	touch $@

demo: $(VENV)/installed
	$(BIN)/python tools/smollm2.py
	$(BIN)/shardmerge plan configs/demo.yaml --overwrite
	$(BIN)/shardmerge run configs/demo.yaml --overwrite
	HF_HUB_OFFLINE=1 $(BIN)/python tools/demo.py --base $(DEMO_BASE) --adapter configs/demo/adapter --merged output/demo
	$(BIN)/shardmerge verify output/demo --quiet
	HF_HUB_OFFLINE=1 $(BIN)/shardmerge compare output/demo --prompt "Who are you?" --max-new-tokens 16
	$(BIN)/shardmerge run configs/demo.yaml -s output.path=output/demo-gguf -s output.format=gguf --overwrite
	$(BIN)/python tools/ask_llama_cpp.py output/demo-gguf/demo-gguf-q8_0.gguf "Who are you?" --expect shardmerge
	$(BIN)/shardmerge verify output/demo-gguf --quiet
	HF_HUB_OFFLINE=1 $(BIN)/shardmerge chat output/demo --prompt "What is the capital of Loraland?"

test: $(VENV)/installed
	$(BIN)/python -m pytest -m "not slow" $(PARALLEL)

test-all: $(VENV)/installed
	$(BIN)/python -m pytest $(PARALLEL)

lint: $(VENV)/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/check-jsonschema --builtin-schema vendor.github-workflows .github/workflows/*.yml
	$(BIN)/check-jsonschema --builtin-schema custom.github-workflows-require-timeout .github/workflows/*.yml

format: $(VENV)/installed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# In a virtual environment of its own: nothing is there but what the wheel asks for.
WHEEL_VENV := build/wheel-venv
wheel:
	rm -rf build dist
	$(PYTHON) -m venv $(WHEEL_VENV)
	$(WHEEL_VENV)/bin/python -m pip wheel --quiet --disable-pip-version-check --no-deps --wheel-dir dist .
	$(WHEEL_VENV)/bin/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt dist/*.whl
	$(WHEEL_VENV)/bin/python -I tools/smoke.py

# Shapes for which disk lacks are left out, and told. MERGEKIT=PATH is an interpreter that has mergekit.
BENCH_OPTIONS ?= --shape all --runs 5 --check --sweep 8,64,256 $(if $(wildcard /dev/shm/.),--in-memory /dev/shm/shardmerge-bench)
bench: $(VENV)/installed
	$(BIN)/python -m benchmarks.merge $(BENCH_OPTIONS) $(if $(MERGEKIT),--mergekit-python $(MERGEKIT)) \
		--results output/bench/results.jsonl; status=$$?; \
	$(BIN)/python -m benchmarks.plot output/bench/results.jsonl --out output/bench && exit $$status

clean:
	rm -rf $(VENV) output build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis
