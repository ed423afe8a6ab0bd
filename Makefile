# `make demo` and `make test` do all the set-up themselves; the second call starts in seconds.
PYTHON ?= python3
BIN := .venv/bin
STAMP := .venv/installed

.PHONY: setup demo test proof slice lint types bench-gpu clean
setup: $(STAMP)

# pip runs again only when what is wanted has changed; an unpinned torch would bring gigabytes of CUDA packages, hence the constraints.
$(STAMP): pyproject.toml constraints.txt
	@echo "installing into .venv (1 to 3 minutes)"
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv
	@$(BIN)/python -m pip install -qq -c constraints.txt -e '.[publish,score,report,mlflow,dev]'
	@touch $@

demo: $(STAMP)
	$(BIN)/trifold demo

test: $(STAMP)
	$(BIN)/python -m pytest

# Stopped and started again, it goes on with what has not passed at this commit (pytest's 5: nothing was left to run).
proof: $(STAMP)
	$(BIN)/python -m pytest -m proof --unproven --timeout 3600 || test $$? -eq 5

# Two minutes of the proofs, from a place that the commit chooses; what skips was left to other commits.
slice: $(STAMP)
	$(BIN)/python -m pytest -m proof --seconds 120 --timeout 3600

# The table of goals on one GPU, under nine minutes. Where a torch for its CUDA is installed already: make bench-gpu BENCH_PYTHON=python3
BENCH_PYTHON ?= $(BIN)/python
bench-gpu:
	$(BENCH_PYTHON) -m launch.cli bench gpu --out runs/bench-gpu

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(STAMP)
	$(BIN)/mypy

clean:
	rm -rf .venv build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis runs/demo
