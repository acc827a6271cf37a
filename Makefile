# Everything happens in .venv, set up on first use and again when the requirements change.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

.PHONY: demo test slow bench soak mutants lint docs clean

demo: $(READY)
	$(BIN)/python examples/demo.py

# One thread for each of the two test processes: more would fight over the cores.
test: lint
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadgroup

slow: $(READY)
	$(BIN)/python -m pytest -m slow

# What every part costs beside plain training, on one core.
bench: $(READY)
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/cost.py

# Runs of every mode killed and gone on with: is anything lost? Some minutes.
soak: $(READY)
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/soak.py --kills 200

# Which single changes of the mathematics do its tests not notice? A sample; half an hour on one core.
mutants: $(READY)
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/mutants.py

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/mypy

docs: $(READY)
	$(BIN)/mkdocs build --strict

$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.version_info >= (3, 11) or sys.exit("constraints.txt needs Python 3.11 or later; call make with PYTHON=<a newer python>")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q -c constraints.txt -e '.[dev]'
	touch $@

clean:
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache .hypothesis runs site
