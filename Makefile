# `make demo`, `make test` and `make test-all` need only Python >= 3.11. The first call of any of them creates .venv.
PYTHON ?= python3
BIN = .venv/bin
INSTALL = $(BIN)/python -m pip install --quiet -c constraints.txt
export MPLBACKEND = Agg

.PHONY: demo test test-all check fuzz docs docs-serve

# distillation on handwritten digits, in both frameworks
demo: .venv/demo
	$(BIN)/python examples/digits.py

# every loss, every property, both packages
test: .venv/installed
	$(BIN)/python -m pytest -m "not slow"

# the slow tests as well: trainings, many random draws, browsers, processes, large meshes. `make test test-all` runs each test once
test-all: test
	$(BIN)/python -m pytest -m slow

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

.venv/made:
	$(PYTHON) -m venv .venv
	$(INSTALL) pip
	touch $@

.venv/demo: .venv/made pyproject.toml constraints.txt
	$(INSTALL) -e '.[all]' --group examples
	touch $@

# tests/test_moving.py runs the losses of these libraries. They are installed without their dependencies, such as torchvision, triton
# and torchao, which the losses do not use.
.venv/installed: .venv/made pyproject.toml constraints.txt
	$(INSTALL) -e '.[all]' --group test --group check
	$(INSTALL) --no-deps torchdistill liger-kernel torchtune lightly
	touch $@ .venv/demo
