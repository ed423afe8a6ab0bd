# `make demo` and `make test` do all the set-up themselves; the second call starts in seconds.
PYTHON ?= python3
BIN := .venv/bin
STAMP := .venv/installed
S3_SERVER := .venv/s3-server/installed

.PHONY: setup s3-server demo check test proof slice lint types links density bench-gpu clean
setup: $(STAMP)

# pip runs again only when what is wanted has changed; an unpinned torch would bring gigabytes of CUDA packages, hence the constraints.
$(STAMP): pyproject.toml constraints.txt
	@echo "installing into .venv (1 to 3 minutes)"
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv
	@$(BIN)/python -m pip install -qq -c constraints.txt -e '.[publish,score,report,objects,fp8,mlflow,dev]'
	@touch $@

demo: $(STAMP)
	$(BIN)/trifold demo

# The S3 server that tests speak to, in an environment of its own: its botocore wants python-dateutil 2, and ours has 4.
s3-server: $(S3_SERVER)
$(S3_SERVER): $(STAMP) tests/s3-server.txt
	@$(PYTHON) -m venv .venv/s3-server
	@.venv/s3-server/bin/python -m pip install -qq -r tests/s3-server.txt
	@touch $@

# What to run before each commit: the tests that start no process and load no stock class. Under 2 minutes on 2 cores.
check: lint types
	$(BIN)/python -m pytest -m "not slow and not proof" -n 2 -q

# Tests that start processes (ranks, Ray clusters) run one at a time: each takes both cores. Prints the slowest.
test: $(STAMP) $(S3_SERVER)
	$(BIN)/python -m pytest -m "not processes and not proof" -n 2 --durations 20
	$(BIN)/python -m pytest -m "processes and not proof" --durations 20

# Stopped and started again, it goes on with what has not passed at this commit (pytest's 5: nothing was left to run).
proof: $(STAMP) $(S3_SERVER)
	$(BIN)/python -m pytest -m proof --unproven --timeout 3600 || test $$? -eq 5

# Two minutes of the proofs, from a place that the commit chooses; what skips was left to other commits.
slice: $(STAMP) $(S3_SERVER)
	$(BIN)/python -m pytest -m proof --seconds 120 --timeout 3600

# The table of goals on one GPU, under nine minutes. Where a torch for its CUDA is installed already: make bench-gpu BENCH_PYTHON=python3
BENCH_PYTHON ?= $(BIN)/python
bench-gpu:
	$(BENCH_PYTHON) -m trifold.launch.cli bench gpu --out runs/bench-gpu

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(STAMP) links
	$(BIN)/mypy -p trifold -p tests

# Links by which mypy finds trifold.*, because it does not follow setuptools' package-dir.
links:
	@mkdir -p .mypy/trifold
	@for package in modeling pretrain finetune launch; do ln -sfn ../../$$package .mypy/trifold/$$package; done

# Tokens per code line by folder, long lines, the longest files, the number of tests. A report: no test enforces it.
density: $(STAMP)
	$(BIN)/python tests/density.py

clean:
	rm -rf .venv build dist *.egg-info .pytest_cache .mypy .mypy_cache .ruff_cache .hypothesis runs/demo
