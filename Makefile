# Everything runs from .venv, made by the first target that needs it. Pass arguments with ARGS, an interpreter with PYTHON:
#   make quickstart ARGS="--set sweep.trials=2"      make test ARGS="-k attacks"      make install PYTHON=python3.12
PYTHON ?= python3
ARGS ?=
BIN := .venv/bin

.PHONY: licences sbom install trackers quickstart lint check quick test test-with-ray test-without-ray test-slow fashion-mnist chromium
.DEFAULT_GOAL := install

install: .venv/.installed

.venv/.installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "dra needs Python 3.11 or newer, but PYTHON=$(PYTHON) is not; pass another with 'make $(or $(MAKECMDGOALS),install) PYTHON=python3.11'" >&2; exit 1; }
	@echo "installing into .venv (several GB with torch, some minutes) ..."
	@$(PYTHON) -m venv .venv || { echo "$(PYTHON) cannot make a virtual environment; on Debian and Ubuntu install python3-venv" >&2; exit 1; }
	@$(BIN)/python -m pip install -qq --disable-pip-version-check -c constraints.txt -e '.[test]'
	@touch $@

# the optional trackers, which slow tests check against their real servers and readers; Trackio's test is skipped, since it
# wants a Pillow below 13: pip install 'trackio' 'pillow<13' runs it
trackers: .venv/.trackers

.venv/.trackers: .venv/.installed
	@echo "installing MLflow, W&B and optuna-dashboard into .venv ..."
	@$(BIN)/python -m pip install -qq --disable-pip-version-check -c constraints.txt -e '.[test,dashboard,mlflow,wandb]'
	@touch $@

quickstart: install
	$(BIN)/dra quickstart $(ARGS)

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# lint, and the quick ones of the tests without Ray: no training, no attacks, no servers, nothing that takes seconds
QUICK := -m "not slow and not seconds" --ignore=tests/cluster --ignore=tests/training --ignore=tests/attacks --ignore=tests/parity \
  --ignore=tests/storage/test_faults.py --ignore=tests/storage/test_uris.py --ignore=tests/config/test_bounds.py --ignore=tests/data/test_sizes.py
check: install
	@$(MAKE) --no-print-directory --keep-going --jobs=2 --output-sync=target lint quick

quick: install
	$(BIN)/python -m pytest -q -n auto $(QUICK) $(ARGS)

# The tests that share one Ray mostly wait for it, so the others run at the same time, on every core; Ray's own workers have
# a niceness of 15, which they give way to. What each says comes when it has ended. ARGS may leave one of the two without a test.
test: lint
	@$(MAKE) --no-print-directory --keep-going --jobs=2 --output-sync=target test-with-ray test-without-ray

test-with-ray: install
	$(BIN)/python -m pytest --durations=15 tests/cluster $(ARGS) || [ $$? -eq 5 ]

test-without-ray: install
	nice -n 19 $(BIN)/python -m pytest -n auto --durations=15 --ignore=tests/cluster $(ARGS) || [ $$? -eq 5 ]

# docs/licences.md, from what each package says of itself
licences: install
	$(BIN)/python .ci/licences.py

# every package that is installed, with its licence, as CycloneDX; the tool has an environment of its own, or it would list itself
sbom: install
	@$(PYTHON) -m venv .sbom && .sbom/bin/python -m pip install -qq --disable-pip-version-check 'cyclonedx-bom>=7,<8'
	.sbom/bin/cyclonedx-py environment --pyproject pyproject.toml --output-reproducible -o sbom.cdx.json $(BIN)/python

# $(1) is a package of Debian's, installed where we may; where not, $(2) says what is skipped without it and what helps
define from_debian
as=; [ "$$(id -u)" = 0 ] || as="sudo -n"; \
if $$as apt-get install -y -qq $(1) >/dev/null 2>&1 || \
  { $$as apt-get update -qq && $$as apt-get install -y -qq $(1); } >/dev/null 2>&1; \
then echo "installed Debian's package $(1)"; \
else echo "$(2)" >&2; fi
endef

# the images of Fashion-MNIST
FASHION := /usr/share/datasets/fashion-mnist
WITHOUT_FASHION := the tests that need Fashion-MNIST are skipped: install Debian's package dataset-fashion-mnist, or put its four .gz files into $(FASHION)
fashion-mnist:
	@if [ -d $(FASHION) ]; then exit 0; fi; $(call from_debian,dataset-fashion-mnist,$(WITHOUT_FASHION))

# a browser, which looks whether pages fit a telephone
WITHOUT_CHROMIUM := the tests of narrow pages are skipped: install Debian's package chromium
chromium:
	@if command -v chromium google-chrome >/dev/null; then exit 0; fi; $(call from_debian,chromium,$(WITHOUT_CHROMIUM))

test-slow: install trackers fashion-mnist chromium
	$(BIN)/python -m pytest --durations=15 -m slow $(ARGS)
