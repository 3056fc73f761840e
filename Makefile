# Everything starts here. The first `make quickstart` or `make test` makes .venv, installs exact versions and builds the operators; later ones reuse them.
#   make quickstart                 train, evaluate and look at a detector (needs Python 3.10 or newer and, for speed, a C++ compiler)
#   make test                       every notebook and every test
#   make test PYTHON=python3.12     with another Python;  VENV=/path: in another place;  ARGS="-k nms": only some;  ARGS="-n 0": one process
.DEFAULT_GOAL := help
.PHONY: help quickstart test lab export readme site bench prepare clean
SHELL := /bin/bash

PYTHON ?= python3
VENV ?= .venv
PY := $(VENV)/bin/python
PIP := $(PY) -m pip install $$([ -t 1 ] || echo -q) --disable-pip-version-check --no-input
ARGS ?=
OPERATORS := $(wildcard csrc/*.cpp csrc/*.cu csrc/*.h)
export MPLBACKEND := agg

help:
	@sed -n '2,4s/^#   //p' Makefile
	@echo 'make lab                        JupyterLab, opened on the book'
	@echo 'make export | readme | site     notebooks to package | front page to README.md | book to static pages in _docs/'
	@echo 'make bench                      the measuring sticks in benchmarks/'
	@echo 'make prepare                    what a change must pass before it is committed'
	@echo 'make clean                      away with caches and builds (never with .venv or runs/)'

$(PY):
	@$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(0 if v >= (3, 10) else f"notebook_det needs Python 3.10 or newer; {sys.executable} is {v[0]}.{v[1]}. Try: make PYTHON=python3.12 ...")'
	@echo "one-time set-up in $(VENV): PyTorch and friends, 3 to 6 minutes, 6 GB of disk"
	@$(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); echo "could not make a virtual environment with $(PYTHON) (Debian and Ubuntu: apt install python3-venv)"; exit 1; }

$(VENV)/.run: requirements.txt | $(PY)
	@echo "installing what the package needs ..."
	@$(PIP) -r requirements.txt && touch $@

$(VENV)/.package: $(VENV)/.run settings.ini setup.py $(OPERATORS)
	@echo "building the operators ..."
	@$(PIP) --no-deps --no-build-isolation -e . > $(VENV)/build.log 2>&1 || { \
	  echo "the C++ operators could not be built ($(VENV)/build.log says why): going on with the readable references, which are slower"; \
	  NOTEBOOK_DET_OPS=0 $(PIP) --no-deps --no-build-isolation -e .; }
	@touch $@

$(VENV)/.ci: requirements-ci.txt $(VENV)/.run
	@echo "installing what the book and its tests need ..."
	@$(PIP) -r requirements-ci.txt && touch $@

quickstart: $(VENV)/.package
	@$(PY) tools/book.py quickstart

test: $(VENV)/.package $(VENV)/.ci
	@PYTHONHASHSEED=0 $(PY) -m pytest -n auto --dist worksteal $(ARGS)

lab: $(VENV)/.package $(VENV)/.ci
	@cd nbs && env -u MPLBACKEND $(abspath $(PY)) -m jupyterlab $$([ "$$(id -u)" != 0 ] || echo --allow-root) index.ipynb

readme site export: $(VENV)/.package $(VENV)/.ci
	@$(PY) tools/book.py $@

bench: $(VENV)/.package $(VENV)/.ci
	@set -e; for f in $(filter-out benchmarks/small.py benchmarks/ablation.py benchmarks/gpu.py,$(wildcard benchmarks/*.py)); do echo "$$f"; $(PY) $$f; done
	@echo "The small protocol takes hours, a method at a time: $(PY) benchmarks/small.py METHOD (or benchmarks/ablation.py); on a GPU: $(PY) benchmarks/gpu.py"

prepare: export
	@$(PY) tools/book.py clean
	@$(PY) -m pytest tests/test_sync.py tests/test_house.py

clean:
	@rm -rf _docs _proc build *.egg-info .pytest_cache .hypothesis notebook_det/_C*.so $(VENV)/.package
	@find . -name __pycache__ -not -path './.venv/*' -prune -exec rm -rf {} +; find nbs -name .ipynb_checkpoints -prune -exec rm -rf {} +
