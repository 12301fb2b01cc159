# Everything a contributor runs. Each target builds its own virtual environment first.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PYTEST_WORKERS ?= 2
# A test file stays with one worker, which makes its fixtures once; in alphabetical order the long files do not come last.
PYTEST_PARALLEL := -n $(PYTEST_WORKERS) --dist loadscope --no-loadscope-reorder

.PHONY: demo test test-slow test-upstream test-upstream-fast check-rewards test-faults lint clean

$(VENV)/.installed: pyproject.toml .ci/constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint .ci/constraints.txt --editable ".[dev,math,plots,quantization,space]"
	touch $@

demo: $(VENV)/.installed  ## train three experts and answer mixed prompts, offline
	$(BIN)/peft-svf demo $(DEMO_ARGS)

test: $(VENV)/.installed  ## the whole test-suite
	$(BIN)/python -m pytest $(PYTEST_PARALLEL)

test-slow: $(VENV)/.installed  ## the thorough forms of tests that `make test` runs in small
	$(BIN)/python -m pytest $(PYTEST_PARALLEL) -m slow

test-upstream: $(VENV)/.installed  ## PEFT's own test-suite with SVF
	$(BIN)/python tests/upstream/run.py --workers $(PYTEST_WORKERS)

test-upstream-fast: $(VENV)/.installed  ## the part of it that continuous integration runs
	$(BIN)/python tests/upstream/run.py --workers $(PYTEST_WORKERS) --fast

check-rewards: $(VENV)/.installed  ## rewards and sandbox against the real data sets in ../shared
	$(BIN)/python tests/check_rewards $(CHECK_ARGS)

test-faults: $(VENV)/.installed  ## kill a training process at random moments, resume it, compare
	$(BIN)/python tests/faults $(FAULT_ARGS)

lint: $(VENV)/.installed  ## ruff and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	rm -rf build/typing
	$(BIN)/python -m pip install --quiet --no-deps --target build/typing .
	$(BIN)/mypy  # reads the package as installed: trainers/ and hub_cards/ lie in peft_svf only there

clean:
	rm -rf $(VENV) build dist .pytest_cache .mypy_cache .ruff_cache
