# Each target makes the environment it needs; a second run is quick.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test test-random test-fuzz test-corruption test-faults test-processors lint format bench clean

demo: .venv/.demo
	$(BIN)/vilu demo

test: .venv/.dev
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --dist loadfile --no-loadscope-reorder

test-random: .venv/.dev
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto -p randomly -v $(ARGS)

# Hypothesis tests alone, with random examples, ROUNDS times as many as `make test`; SEED repeats the first round.
ROUNDS ?= 10
test-fuzz: .venv/.dev
	for round in $$(seq $(ROUNDS)); do \
		seed=$${SEED:-$$(od -An -N4 -tu4 /dev/urandom | tr -d ' ')}; unset SEED; \
		echo "round $$round of $(ROUNDS): SEED=$$seed"; \
		HYPOTHESIS_PROFILE=fuzz OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto -m hypothesis --hypothesis-seed=$$seed $(ARGS) || exit; \
	done

# Damage to every file of every artefact, and edits of every document; SEED=... draws others, the log tells of each.
test-corruption: .venv/.dev
	SEED=$${SEED:-0} DAMAGES=$${DAMAGES:-1200} USES=$${USES:-99} EDITS=$${EDITS:-1000} OMP_NUM_THREADS=1 \
		CORRUPTION_LOG=$${CORRUPTION_LOG:-build/corruption.jsonl} \
		$(BIN)/python -m pytest -n 2 --show-capture=no tests/corruption $(ARGS)

# Every command broken in every way, TRIALS times, and the long form of several processes at once; SEED repeats, OUT keeps
# a line per trial. As root on Linux, or what needs a mount is skipped.
TRIALS ?= 5
test-faults: .venv/.dev
	seed=$${SEED:-$$(od -An -N3 -tu4 /dev/urandom | tr -d ' ')}; echo "SEED=$$seed"; \
		SEED=$$seed TRIALS=$(TRIALS) OMP_NUM_THREADS=1 $(BIN)/python -m pytest -s -rs tests/faults $(ARGS)

test-processors: .venv/.dev
	$(BIN)/python tools/processors.py $(ARGS)

lint: .venv/.dev
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/python tools/house.py

format: .venv/.dev
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

bench: .venv/.dev
	$(BIN)/python -m benchmarks

clean:
	rm -rf .venv demo-output build dist

.venv/pyvenv.cfg:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "vilu needs Python 3.11 or newer; found $$($(PYTHON) --version). Say: make PYTHON=python3.11 ..." >&2; exit 1; }
	$(PYTHON) -m venv .venv

.venv/.%: .venv/pyvenv.cfg pyproject.toml
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[$*]'
	@touch $@
