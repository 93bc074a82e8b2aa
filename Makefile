# Everything here sets itself up on a fresh clone: a virtual environment at .venv with the locked
# versions. For the small CPU build of torch on Linux, point pip at PyTorch's CPU index:
#   PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu make demo
PYTHON ?= python3
BIN := .venv/bin
READY := .venv/.ready
FLOOR := .venv-floor
# Files in the order of tests/conftest.py; xdist's own order has those with few and long tests last.
TWO := -n 2 --dist loadfile --no-loadscope-reorder
SELECT := -m "not slow"

.PHONY: demo test test-slow test-floor check format package faults base bench bench-growth bench-gpu docs clean

demo: $(READY)  ## Fine-tune the embedded model on the embedded facts: one minute, nothing to download
	$(BIN)/molf train

test: $(READY)  ## Lint, types and every test not marked slow (no network, no GPU); all with SELECT=
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/python -m pytest $(TWO) $(SELECT)

test-slow: $(READY) .venv/.trackers  ## The tests marked slow
	$(BIN)/python -m pytest $(TWO) -m slow

test-floor: $(FLOOR)/.ready  ## Every test with the oldest versions that pyproject.toml allows
	$(FLOOR)/bin/python -m pytest $(TWO)

check: $(READY)  ## Lint, format and types alone
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

format: $(READY)
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

docs: .venv/.docs  ## The documentation site, in site/: a warning or a broken link fails
	rm -rf site
	$(BIN)/python -m sphinx --quiet --fail-on-warning --keep-going --fresh-env -d build/doctrees docs site
	$(BIN)/python scripts/check_site.py site

package: .venv/.package  ## Wheel and sdist in dist/, checked as PyPI and pip take them; Dockerfile, workflows
	rm -rf dist build/lib build/bdist.*
	$(BIN)/python -m build --no-isolation
	$(BIN)/python -m twine check --strict dist/*
	$(BIN)/check-wheel-contents dist/*.whl
	$(BIN)/hadolint Dockerfile
	$(BIN)/zizmor --offline --no-progress --strict-collection --config .github/zizmor.yml .github/workflows

faults: $(READY)  ## Plant faults in the optimizer; every one must make a test fail
	$(BIN)/python scripts/planted_faults.py

base: $(READY)  ## Rebuild the embedded base model
	$(BIN)/python scripts/build_base.py

bench: $(READY)  ## Bars of speed and memory on a CPU: pass, fail or undecided (twenty minutes)
	$(BIN)/python benchmarks/bars.py

bench-growth: $(READY)  ## How a step grows with rank, experts, depth and tokens: tables and a plot
	$(BIN)/python benchmarks/growth.py --json benchmarks/results/growth_cpu.json \
	  --plot benchmarks/results/growth_cpu.png

bench-gpu: $(READY)  ## Whole trainings and the optimizer's step on a CUDA GPU: bars, tokens/s, MFU, memory
	$(BIN)/python benchmarks/gpu.py

clean:
	rm -rf .venv $(FLOOR) build dist site src/*.egg-info

$(READY): requirements-dev.lock pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements-dev.lock
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation -e .
	touch $@

.venv/.docs: $(READY) requirements-docs.lock
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements-docs.lock -c requirements-dev.lock
	touch $@

.venv/.package: $(READY) requirements-package.lock
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements-package.lock -c requirements-dev.lock
	touch $@

.venv/.trackers: $(READY) requirements-trackers.lock
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps -r requirements-trackers.lock
	touch $@

$(FLOOR)/.ready: requirements-dev.lock pyproject.toml scripts/floors.py
	$(PYTHON) -m venv $(FLOOR)
	$(FLOOR)/bin/python scripts/floors.py > $(FLOOR)/floors.txt
	$(FLOOR)/bin/python scripts/floors.py --without-dependencies > $(FLOOR)/apart.txt
	$(FLOOR)/bin/python -m pip install --quiet --disable-pip-version-check -r $(FLOOR)/floors.txt
	$(FLOOR)/bin/python -m pip install --quiet --disable-pip-version-check --no-deps -r $(FLOOR)/apart.txt
	$(FLOOR)/bin/python -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation -e .
	touch $@
