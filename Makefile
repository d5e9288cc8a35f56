# make help lists what there is.
PYTHON ?= python3
BIN := .venv/bin
READY := .venv/.ready

.DEFAULT_GOAL := help
.PHONY: help setup demo test lint format bench clean

help:  ## list these commands
	@grep -E '^[a-z]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z]+):.*## /  make \1\t/' | expand -t 16

setup: $(READY)  ## make .venv from constraints.txt, where it is missing or stale

$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "saesteer needs Python 3.11 or newer; try: make setup PYTHON=python3.11"; exit 2; }
	@$(BIN)/python -c '' 2>/dev/null || $(PYTHON) -m venv --clear .venv
	$(BIN)/python -m pip install --quiet -c constraints.txt setuptools
	$(BIN)/python -m pip install --quiet --no-build-isolation -c constraints.txt -e '.[dev]'
	@touch $(READY)

demo: setup  ## the whole job on the embedded model, offline: cache, train, index, search, steer
	@$(BIN)/saesteer demo

test: setup  ## run every test
	@$(BIN)/python -m pytest

# mypy and import-linter look at the built wheel: only there do training/ and features/ stand where
# they are imported from.
lint: setup  ## ruff, mypy and the import contracts
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	@rm -rf build/lib build/wheel build/unpacked && mkdir -p build/wheel build/unpacked
	@$(BIN)/python -m pip wheel --quiet --no-deps --no-build-isolation --wheel-dir build/wheel .
	@cd build/unpacked && ../../$(BIN)/python -m zipfile -e ../wheel/*.whl .
	cd build/unpacked && ../../$(BIN)/mypy --config-file ../../pyproject.toml -p saesteer
	cd build/unpacked && ../../$(BIN)/lint-imports --config ../../pyproject.toml

format: setup  ## let ruff mend what it can
	$(BIN)/ruff check --fix . ; $(BIN)/ruff format .

bench: setup  ## time it all beside its peers, and write benchmarks/RESULTS.md
	@# A peer that can't be installed is printed as not run.
	-$(BIN)/python -m pip install --quiet --no-deps --upgrade \
		--target build/peers/dictionary_learning -r benchmarks/peers/dictionary_learning.txt
	$(BIN)/python benchmarks/training.py
	$(BIN)/python benchmarks/caching.py
	$(BIN)/python benchmarks/steering.py
	$(BIN)/python benchmarks/search.py
	$(BIN)/python benchmarks/planted_search.py
	$(BIN)/python benchmarks/indexing.py

clean:  ## remove what was built (not .venv, not runs/)
	rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
