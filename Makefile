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
BENCHES = $(filter-out side,$(patsubst tools/bench/%.py,%,$(shell grep -l __main__ tools/bench/*.py)))
RUN := $(if $(filter-out 1,$(NPROC)),$(TORCHRUN) $(NPROC) -m transpixeler,$(BIN)/python -m transpixeler)

.PHONY: help setup demo plan cache train eval sample push test lint format bench inspect
help:  ## show this
	@echo "Each target sets up what it needs first. Begin with: make demo"
	@echo
	@sed -nE 's/^([a-z]+):[^#=]*## (.*)$$/\1|\2/p' $(MAKEFILE_LIST) | while IFS='|' read -r name text; do printf '  %-9s %s\n' "$$name" "$$text"; done
	@echo
	@echo "  CONFIG=   the YAML file ($(CONFIG))"
	@echo "  NPROC=    processes on this machine, for cache, train, eval and sample ($(NPROC))"
	@echo "  ARGS=     anything more: options, and config keys such as optim.lr=5e-5"
	@echo "  PYTHON=   the Python that setup takes ($(PYTHON))"
	@echo
	@echo "    make train CONFIG=my.yaml NPROC=4 ARGS=optim.lr=5e-5"
	@echo "    make sample ARGS='output/latest --prompt \"a paper boat burns\"'"
	@echo
	@echo "$(BIN)/transpixeler --help tells the commands; transpixeler/docs/ holds the guides."

setup: $(READY)  ## make .venv with all that is needed, again when pyproject.toml or constraints.txt change
	@echo "ready: $(VENV) has $$($(BIN)/transpixeler --version) on $$($(BIN)/python --version); for a shell: . $(BIN)/activate"

$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { echo "setup: Python 3.10 or newer is needed, and $(PYTHON) is $$($(PYTHON) --version 2>&1); name another with PYTHON="; exit 1; }
	@echo "setup: making $(VENV) with $$($(PYTHON) --version): transpixeler, torch and what they need; some GB, minutes the first time"
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	@touch $@

PROMPT ?= a red circle drifts left, half transparent

# The whole way on a tiny model and two processes of the CPU, GPU or not: files → cache → train → evaluate → a video with
# alpha → report, and what was learned, measured on captions that were held out: a table, and one line of JSON. It is
# timed from its first line. ARGS=--resume goes on with a training that was stopped.
demo: export CUDA_VISIBLE_DEVICES =
demo: $(READY)  ## the whole way on a tiny model: files, training, evaluation, a video with alpha, a report
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

%.yaml:
	@echo "$@: no such file; name a config with CONFIG=, such as configs/wan2.1-t2v-1.3b-joint.yaml"; exit 2

plan: $(READY) $(CONFIG)  ## estimate steps, memory, time and layouts of CONFIG
	$(BIN)/python -m transpixeler plan $(CONFIG) $(ARGS)

push: $(READY)  ## upload a run to the Hub: ARGS="output/latest --repo user/name"
	$(BIN)/python -m transpixeler push $(ARGS)

cache: $(READY) $(CONFIG)  ## encode clips and captions of CONFIG that are not cached yet
	$(RUN) cache $(CONFIG) $(ARGS)

train: $(READY) $(CONFIG)  ## cache what is missing, then train CONFIG; ARGS=--resume goes on
	$(RUN) train $(CONFIG) $(ARGS)

eval: $(READY) $(CONFIG)  ## measure CONFIG's run on data.eval
	$(RUN) eval $(CONFIG) $(ARGS)

# make sample ARGS='output/latest --prompt "a paper boat burns"'
sample: $(READY)  ## make videos: ARGS='output/latest --prompt "a boat"'
	$(RUN) sample $(ARGS)

inspect: $(READY)  ## check a data set and show every pair on one page: ARGS=/path/to/clips
	$(BIN)/python -m transpixeler inspect $(ARGS)

# Workers share the expensive fixtures; each takes about a gigabyte, so that many cores do not mean more than eight.
# make test ARGS=tests/data    make test ARGS="-n 0 tests/data -k pairs" in one process, as a debugger wants it
test: $(READY)  ## run the tests: ARGS=tests/data for some of them
	@$(BIN)/python -m compileall -q transpixeler tests tools  # once, where PYTHONDONTWRITEBYTECODE has each process do it
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses auto --maxprocesses 8 --dist $(DIST) --durations 20 $(ARGS)

lint: $(READY)  ## check style and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/basedpyright

format: $(READY)  ## mend style
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(READY)  ## time one thing: ARGS=step, sample, cache, load …
	@test -f "tools/bench/$(firstword $(ARGS)).py" || { echo "bench: name a bench with ARGS=, such as ARGS=step; there are $(BENCHES)"; exit 2; }
	$(BIN)/python tools/bench/$(firstword $(ARGS)).py $(wordlist 2,99,$(ARGS))
