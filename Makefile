# `make demo` and `make test` need Python >= 3.11 and nothing else; each makes .venv on its first call.
PYTHON ?= python3
BIN = .venv/bin
export MPLBACKEND = Agg

.PHONY: demo test check fuzz docs docs-serve

demo: .venv/installed
	$(BIN)/python examples/digits.py

test: .venv/installed
	$(BIN)/python -m pytest

fuzz: .venv/installed
	PYTHONPATH=. $(BIN)/python tests/fuzz.py

docs: .venv/installed
	PYTHONPATH=. $(BIN)/python docs/pictures.py
	$(BIN)/mkdocs build --strict

docs-serve: docs
	$(BIN)/mkdocs serve --strict

check: .venv/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# torchdistill comes without torchvision and Cython, which its losses do not use; tests/test_moving.py runs them
.venv/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet -c constraints.txt pip
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[all]' --group test --group check
	$(BIN)/python -m pip install --quiet -c constraints.txt --no-deps torchdistill
	touch $@
