# Two commands are all a newcomer needs: `make demo` and `make test`.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
DEMO ?= demo
STAGE ?= all
# GANEXPORT_GPU_DEADLINE: seconds after which `make gpu` starts nothing new.
GANEXPORT_GPU_DEADLINE ?= 540

.DEFAULT_GOAL := help
.PHONY: help setup demo test test-slow lint format bench gpu clean

help: ## Show this list
	@awk 'BEGIN{FS=":.*## "} /^[a-z-]+:.*## /{printf "  make %-10s %s\n",$$1,$$2}' $(MAKEFILE_LIST)

$(VENV)/.installed: pyproject.toml CMakeLists.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[dev]'
	@touch $@

setup: $(VENV)/.installed ## Make .venv with everything the demo and the tests need

demo: $(VENV)/.installed ## Train on real MNIST, convert, verify, generate, benchmark, report (about 6 minutes)
	rm -rf $(DEMO)/run $(DEMO)/digits
	$(BIN)/ganexport train dcgan-mnist --out $(DEMO)/run --set training.steps=1500
	$(BIN)/ganexport convert $(DEMO)/run --to torchscript --to onnx --to trt -o $(DEMO)/digits
	$(BIN)/ganexport verify $(DEMO)/digits
	$(BIN)/ganexport generate $(DEMO)/digits -n 64 --seed 7 -o $(DEMO)/grid.png
	$(BIN)/ganexport bench $(DEMO)/run $(DEMO)/digits --batch 1,16,64 --seconds 1.5 -o $(DEMO)/bench.json --html $(DEMO)/report.html
	@echo
	@echo "Trained, converted, verified, benchmarked:"
	@echo "  $(DEMO)/grid.png     64 digits, made by the exported generator: look at it"
	@echo "  $(DEMO)/report.html  latency and throughput of every backend on this machine"
	@echo "  $(DEMO)/digits/      the artifact: TorchScript, ONNX, a TensorRT engine, manifest.json"
	@echo "  $(DEMO)/run/         the training run: checkpoints, samples, metrics, learning curves"
	@echo "Next, try:"
	@echo "  $(BIN)/ganexport generate $(DEMO)/digits -n 10 --seed 8 -o $(DEMO)/images"
	@echo "  $(BIN)/ganexport evaluate $(DEMO)/digits"
	@echo "  $(BIN)/ganexport recipes"

test: $(VENV)/.installed ## Run all tests but the long trainings
	@tests/run.sh $(BIN)/python

test-slow: $(VENV)/.installed ## Run the long trainings and full matrices too
	@tests/run.sh $(BIN)/python -m "slow or not slow"

lint: $(VENV)/.installed ## Check style, types and formatting
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(VENV)/.installed ## Rewrite the sources in the project's format
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(VENV)/.installed ## Measure this machine: ours against the stock backends
	$(BIN)/python -m benchmarks.inference
	$(BIN)/python -m benchmarks.tables

gpu: ## Turn a machine with a GPU into evidence (works from the source tree, installs nothing)
	STAGE=$(STAGE) GANEXPORT_GPU_DEADLINE=$(GANEXPORT_GPU_DEADLINE) PYTHONPATH=.:$$PYTHONPATH \
	  $(if $(wildcard $(BIN)/python),$(BIN)/python,$(PYTHON)) -m benchmarks.gpu

clean: ## Remove what make made (the virtual environment, builds, the demo)
	rm -rf $(VENV) build dist $(DEMO) .pytest_cache .ruff_cache .mypy_cache .hypothesis
