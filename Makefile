# Two commands: `make demo` and `make test`. Both set up .venv first, and can be repeated.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: demo test test-studio lint types results setup docs wheel-check test-lowest test-newest

setup: $(VENV)/.ready

# torch is pinned by constraints.txt: a bare one may pull gigabytes of CUDA.
$(VENV)/.ready: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade "pip>=25.1"
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[diffusers,report,distill,studio]" --group dev
	touch $@

demo: setup
	$(BIN)/fewstep demo --out demo --overwrite

# Each process would compile the tests anew where Python is told to write no bytecode.
test: setup
	PYTHONDONTWRITEBYTECODE= $(BIN)/python -m pytest -n auto --maxprocesses 4 --dist loadgroup

# The page of `fewstep studio` in headless Chromium (apt-get install chromium chromium-driver).
test-studio: setup
	$(BIN)/python -m pytest -m studio tests/studio

# The pages of docs/results from benchmarks/results/*.json.
results: setup
	$(BIN)/python scripts/results.py

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: setup
	$(BIN)/pyright --pythonpath $(BIN)/python

# The wheel and the sdist, and the wheel in a new environment outside the repository, offline.
wheel-check:
	$(PYTHON) scripts/wheel_check.py

# The lowest, and the newest, versions that pyproject.toml allows: the package alone, then with its extras.
test-lowest:
	$(PYTHON) scripts/lowest.py

test-newest:
	$(PYTHON) scripts/lowest.py --newest

# The site of the documents, in build/site; a warning or a dead link is an error.
docs: setup
	$(BIN)/python -m pip install --quiet --group docs
	$(BIN)/python scripts/site.py
