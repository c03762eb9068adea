# make demo   trains a tiny agent on this machine and opens nothing: read runs/quickstart/report.html
# make test   everything, the learning and the kill tests included
# make sabotage   breaks a copy of the code in one line at a time: each must make a named test fail
# make lint   formatting, lint rules, strict types
#
# Each sets up .venv by itself. Another torch: make TORCH=torch==2.14.0 …   Another Python: make PYTHON=python3.12 …

PYTHON ?= python3
TORCH ?= $(shell grep '^torch==' constraints.txt)
EXTRAS ?= dev
BIN := .venv/bin
READY := .venv/.ready-$(EXTRAS)

# uv does not read pip's settings, so what pip was told about local wheels is passed on. Where there are none and no
# GPU either, uv picks torch's CPU build by itself.
FIND_LINKS := $(or $(PIP_FIND_LINKS),$(shell $(PYTHON) -m pip config get global.find-links 2>/dev/null))
TORCH_BACKEND := $(if $(FIND_LINKS),,--torch-backend auto)

.PHONY: all demo demo-ci test test-fast sabotage lint format clean
all: .venv

.venv: $(READY)

$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(0 if v >= (3, 11) else f"Python {v.major}.{v.minor} found; 3.11 or newer is needed: make PYTHON=/path/to/python3.11")'
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet 'uv>=0.5'
	(grep -v '^torch==' constraints.txt; echo '$(TORCH)') > .venv/constraints.txt
	UV_FIND_LINKS="$(FIND_LINKS)" VIRTUAL_ENV=$(CURDIR)/.venv $(BIN)/uv pip install --quiet $(TORCH_BACKEND) \
		--constraints .venv/constraints.txt --editable '.[$(EXTRAS)]'
	touch $@

demo: $(READY)
	$(BIN)/turnwise run recipes/quickstart.yaml

# The same run, shortened: it must still learn, only less.
demo-ci: $(READY)
	$(BIN)/python -m pytest tests/end_to_end/test_quickstart.py

# The slow ones one after another: they start processes of their own, and some go by the clock.
test: test-fast
	$(BIN)/python -m pytest -m slow --durations=20

test-fast: $(READY)
	$(BIN)/python -m pytest -m 'not slow' -n auto --durations=20

sabotage: $(READY)
	$(BIN)/python -m tests.sabotage.run --jobs 2

lint: $(READY)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

format: $(READY)
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean:
	rm -rf .venv .mypy_cache .ruff_cache .pytest_cache
