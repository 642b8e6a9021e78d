# make demo    set up, fetch Shakespeare, train a GPT on it, print a sample, draw its loss curve
# make test    set up, check that export changes nothing, run all tests and every lesson
# make lab     set up, open JupyterLab at the map of lessons
# make lessons execute every lesson from a clean kernel and store its outputs
# make site    build the website into _docs/
# make bench   run every benchmark and write bench/results/*.json
# make export  notebooks -> skylar/

PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
WORKERS ?= $(shell n=$$(nproc 2>/dev/null || sysctl -n hw.ncpu); [ $$n -lt 8 ] && echo $$n || echo 8)
# torch first and alone, exactly as pinned: then nothing else may choose another build of it
INSTALL = $(BIN)/pip install -q --disable-pip-version-check -c constraints.txt

.PHONY: demo test lab lessons site bench export lint clean
.DELETE_ON_ERROR:

$(VENV)/.base: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(INSTALL) torch
	$(INSTALL) -e '.[viz]'
	touch $@

$(VENV)/.dev: $(VENV)/.base
	$(INSTALL) -e '.[dev]'
	touch $@

$(VENV)/.browser: $(VENV)/.dev
	$(INSTALL) -e '.[browser]'
	touch $@

demo: $(VENV)/.base
	$(BIN)/skylar demo

test: $(VENV)/.dev
	$(BIN)/python tools/check_export.py
	$(BIN)/ruff check .
	$(BIN)/lint-imports
	OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --dist=loadfile -v

lab: $(VENV)/.dev
	$(BIN)/jupyter lab nbs/index.ipynb

lessons: $(VENV)/.dev
	$(BIN)/python tools/lessons.py time

export: $(VENV)/.dev
	$(BIN)/nbdev_export

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/lint-imports

site: $(VENV)/.dev
	$(INSTALL) -e '.[docs]'
	test -d docs/node_modules || npm install --prefix docs --no-audit --no-fund --no-package-lock
	$(BIN)/python docs/build.py

bench: $(VENV)/.dev
	for b in loader tokenize time_to_quality decode train_gpu "train_step --family qwen3" "train_step --family gpt2"; do \
	    $(BIN)/python bench/$${b%% *}.py $$(echo $$b | cut -s -d' ' -f2-) || exit 1; done
	$(BIN)/python tools/readme_table.py

clean:
	rm -rf $(VENV) _docs docs/_src demo runs
