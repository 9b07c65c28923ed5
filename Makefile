# Each target sets up what it needs first: on a fresh clone, `make demo` or `make test` is the first and only command.
#   CONFIG=  the YAML file        NPROC=  processes on this machine        ARGS=  anything more, such as optim.lr=1e-4

CONFIG ?= demo/config.yaml
NPROC ?= 1
ARGS ?=
DIST ?= worksteal
PYTHON ?= python3

VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
TORCHRUN := OMP_NUM_THREADS=$${OMP_NUM_THREADS:-1} $(BIN)/torchrun --standalone --nproc-per-node
RUN := $(if $(filter-out 1,$(NPROC)),$(TORCHRUN) $(NPROC) -m transpixeler,$(BIN)/python -m transpixeler)

.PHONY: help setup demo plan cache train eval sample push test lint format bench inspect
help:
	@echo "make demo | plan | cache | train | eval | sample | push | inspect | test | lint | bench   with CONFIG= NPROC= ARGS="

setup: $(READY)

$(READY): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	touch $@

PROMPT ?= a red circle drifts left, half transparent

# The whole way on a tiny model and two processes of the CPU, GPU or not: files → cache → train → evaluate → a video with
# alpha → report, and what was learned, measured on captions that were held out: a table, and one line of JSON. It is
# timed from its first line. ARGS=--resume goes on with a training that was stopped.
demo: export CUDA_VISIBLE_DEVICES =
demo: $(READY)
	$(BIN)/python -m transpixeler demo demo
	$(TORCHRUN) 2 -m transpixeler train demo/config.yaml $(ARGS)
	@rm -rf demo/samples
	$(BIN)/python -m transpixeler sample demo/output/latest --prompt "$(PROMPT)" --format mov --format webm --out demo/samples
	$(TORCHRUN) 2 tools/demo_figures.py demo/output/latest --captions 12 --picture demo/figures.png --since $(shell date +%s) >demo/figures.txt
	@echo
	@echo "RGBA videos   $$(ls -d demo/samples/*/rgba.* | tr '\n' ' ')"
	@echo "pictures      demo/figures.png: rgb, companion and both, at three times"
	@echo "report        demo/output/latest/report.html"
	@echo "TensorBoard   $(BIN)/tensorboard --logdir demo/output"
	@cat demo/figures.txt

demo/config.yaml: | $(READY)
	$(BIN)/python -m transpixeler demo demo

plan: $(READY) $(CONFIG)
	$(BIN)/python -m transpixeler plan $(CONFIG) $(ARGS)

push: $(READY)
	$(BIN)/python -m transpixeler push $(ARGS)

cache train: $(READY) $(CONFIG)
	$(RUN) $@ $(CONFIG) $(ARGS)

eval: $(READY) $(CONFIG)
	$(RUN) eval $(CONFIG) $(ARGS)

# make sample ARGS='output/latest --prompt "a paper boat burns"'
sample: $(READY)
	$(RUN) sample $(ARGS)

inspect: $(READY)
	$(BIN)/python -m transpixeler inspect $(ARGS)

# Workers share the expensive fixtures; each takes about a gigabyte, so that many cores do not mean more than eight.
# make test ARGS=tests/data    make test ARGS="-n 0 tests/data -k pairs" in one process, as a debugger wants it
test: $(READY)
	@$(BIN)/python -m compileall -q transpixeler tests tools  # once, where PYTHONDONTWRITEBYTECODE has each process do it
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses auto --maxprocesses 8 --dist $(DIST) --durations 20 $(ARGS)

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/basedpyright

format: $(READY)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(READY)
	$(BIN)/python tools/bench/$(firstword $(ARGS)).py $(wordlist 2,99,$(ARGS))
