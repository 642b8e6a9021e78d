# make demo    set up, fetch Shakespeare, train a GPT on it, print a sample, draw its loss curve
# make test    set up, check that export changes nothing, run all tests and every lesson
# make quick   the unit tests without lessons and without the slow ones: a few minutes
# make lab     set up, open JupyterLab at the map of lessons
# make lessons execute every lesson from a clean kernel and store its outputs
# make site    build the website into _docs/
# make bench   run every benchmark of this machine and write bench/results/*.json
# make gpu     GPU tests and benchmarks in eight minutes (bench/gpu.sh), on a machine with one
# make export  notebooks -> skylar/

PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
WORKERS ?= $(shell n=$$(nproc 2>/dev/null || sysctl -n hw.ncpu); [ $$n -lt 8 ] && echo $$n || echo 8)
# torch first and alone, exactly as pinned: then nothing else may choose another build of it
INSTALL = $(BIN)/pip install -q --disable-pip-version-check -c constraints.txt

PYTEST = OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --dist=loadfile

.PHONY: demo test quick gpu lab lessons site bench export lint clean
.DELETE_ON_ERROR:

$(VENV)/.base: pyproject.toml setup.py constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(INSTALL) torch
	$(INSTALL) -e '.[viz]'
	touch $@

$(VENV)/.dev: $(VENV)/.base
	$(INSTALL) -e '.[dev]'
	$(INSTALL) --no-build-isolation -e ./tools/nbdev_commands
	touch $@

$(VENV)/.browser: $(VENV)/.dev
	$(INSTALL) -e '.[browser]'
	touch $@

$(VENV)/.docs: $(VENV)/.dev docs/package.json
	$(INSTALL) -e '.[docs]'
	npm install --prefix docs --no-audit --no-fund --no-package-lock
	touch $@

demo: $(VENV)/.base
	$(BIN)/skylar demo

test: $(VENV)/.dev
	$(BIN)/python tools/check_export.py
	$(BIN)/ruff check .
	$(BIN)/lint-imports
	$(PYTEST) -v --durations=60

quick: $(VENV)/.dev
	$(PYTEST) -q tests -m 'not slow and not browser and not gpu' --durations=10

lab: $(VENV)/.dev
	$(BIN)/jupyter lab --ServerApp.root_dir=. nbs/index.ipynb

lessons: $(VENV)/.dev
	$(BIN)/python tools/lessons.py time

export: $(VENV)/.dev
	$(BIN)/nbdev_export

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/lint-imports

site: $(VENV)/.docs
	$(BIN)/python docs/build.py

bench: $(VENV)/.dev
	for b in loader tokenize time_to_quality attention decode train_step; do \
	    $(BIN)/python bench/$$b.py || exit 1; done
	$(BIN)/python tools/readme_table.py

gpu: $(VENV)/.dev
	PYTHON=$(BIN)/python bench/gpu.sh

clean:
	rm -rf $(VENV) _docs build docs/_src demo runs
