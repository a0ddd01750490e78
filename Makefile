# Two commands on a fresh machine: `make demo` and `make test`. Each sets up what it needs.
SHELL := /bin/bash
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin

# Where hashes.txt has a file for every package, pip installs no other. `make HASHES=no` does without.
HASHES ?= $(shell $(PYTHON) -c "import platform as p, sys; print('yes' if (p.system(), p.machine()) \
	== ('Linux', 'x86_64') and (3, 11) <= sys.version_info[:2] <= (3, 13) else 'no')")
PIP = $(BIN)/python -m pip install --quiet --disable-pip-version-check

.PHONY: demo test soak long check format lock bench docs clean help

help:            ## show this list
	@grep -hE '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*##/\t/'

demo: $(VENV)/.ready  ## four hospitals co-tune a model, privately, on this machine
	$(BIN)/securefedcollm simulate configs/quickstart.yaml --out runs/quickstart --overwrite

# By file, in order: what a file's tests share is made once. (pytest 9.2 ignores pytest-xdist's groups.)
# Small tensors: two workers with a thread each take less time than two with two threads each.
PYTEST = OMP_WAIT_POLICY=passive OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder --durations=20

test: $(VENV)/.ready  ## the tests, but for those of make soak
	$(PYTEST) -m "not soak"

soak: $(VENV)/.ready  ## the tests that take four seconds to minutes: typed pages, real roles, kills, long searches
	$(PYTEST) -m "soak and not long"

long: $(VENV)/.ready  ## the tests that take more minutes than every change can wait: the page on own data, the rehearsal, a chain of studies over FLARE, documents over the network
	$(PYTEST) -m long

check: $(VENV)/.ready  ## lint, format, types, import contracts
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
ifeq ($(HASHES),yes)
	$(BIN)/python .ci/locks.py check
endif

format: $(VENV)/.ready  ## rewrite the code in house style
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

lock:            ## write the hashes of constraints.txt anew
	$(PYTHON) .ci/locks.py write

bench: $(VENV)/.ready .venv-bench/.ready  ## masking and noise against their peers, the cost of privacy (JSON)
	$(BIN)/python -m benchmarks.masking --repeats 5 --json
	$(BIN)/python -m benchmarks.noise --json
	$(BIN)/python -m benchmarks.privacy_overhead --json

docs: $(VENV)/.ready .venv-docs/.ready  ## the documentation as a site (open site/index.html)
	$(BIN)/python .ci/pages.py docs/reference
	NO_MKDOCS_2_WARNING=1 .venv-docs/bin/mkdocs build --strict

clean:           ## remove what make made (not the runs)
	rm -rf $(VENV) .venv-bench .venv-docs site docs/reference .mypy_cache .ruff_cache .pytest_cache

$(VENV)/.ready: pyproject.toml constraints.txt hashes.txt hashes-build.txt
	$(PYTHON) -m venv $(VENV)
ifeq ($(HASHES),yes)
	$(PIP) --require-hashes --no-deps --requirement hashes-build.txt
	$(PIP) --require-hashes --no-deps --no-build-isolation --use-pep517 --requirement hashes.txt
	$(PIP) --no-build-isolation --constraint constraints.txt --editable '.[dev]'
else
	@echo "no hashes for this platform: installed files are not compared with any"
	$(PIP) --constraint constraints.txt --editable '.[dev]'
endif
	@touch $@

# The peers that the benchmarks compare with, apart from us so that their pins never bind ours.
.venv-bench/.ready:
	$(PYTHON) -m venv .venv-bench
	.venv-bench/bin/python -m pip install --quiet --disable-pip-version-check \
		flwr==1.41.0 opendp==0.16.0
	@touch $@

# What builds the site, apart from us likewise. It reads our code and never imports it.
.venv-docs/.ready:
	$(PYTHON) -m venv .venv-docs
	.venv-docs/bin/python -m pip install --quiet --disable-pip-version-check \
		mkdocs==1.6.1 mkdocs-material==9.8.2 mkdocstrings==1.0.8 mkdocstrings-python==2.0.11 \
		ruff==0.17.5
	@touch $@
