# Each target makes the environment it needs; a second run is quick.
PYTHON ?= python3
BIN := .venv/bin
UV := build/uv/bin/uv --no-managed-python
BENCH := src/vilu_bench
SBOM := $(BIN)/cyclonedx-py environment --output-reproducible
# Tests run in parallel, so each process has one thread. Where a test asks for more, a thread that waits takes no core.
ONE_THREAD := OMP_NUM_THREADS=1 OMP_WAIT_POLICY=PASSIVE
ALL_CORES := -n auto --dist loadfile --no-loadscope-reorder
# Packages are installed without compiled modules (see .venv/.% below). Where the environment forbids Python to write
# those of its imports, each start of a command compiles torch anew, which doubles the time of the tests.
export PYTHONDONTWRITEBYTECODE :=

.PHONY: demo test test-random test-fuzz fuzz test-corruption test-faults test-offline test-slow test-engines test-label-studio test-hostile test-deploy test-processors test-docs test-lowest test-newest test-types test-extras test-wheels compat test-coverage lint types format bench bench-gpu audit docs release clean

demo: .venv/.demo
	$(BIN)/vilu demo

test: .venv/.dev
	$(ONE_THREAD) $(BIN)/python -m pytest $(ALL_CORES) $(ARGS)

# The same, counting which lines and branches run; the lists are in build/coverage.
test-coverage: .venv/.coverage
	$(ONE_THREAD) $(BIN)/python -m pytest $(ALL_CORES) --cov --cov-report=term:skip-covered \
		--cov-report=xml:build/coverage/coverage.xml --cov-report=html:build/coverage/html $(ARGS)

test-random: .venv/.dev
	$(ONE_THREAD) $(BIN)/python -m pytest -n auto -p randomly -v $(ARGS)

# Hypothesis tests alone, with random examples, ROUNDS times as many as `make test`; SEED repeats the first round.
ROUNDS ?= 10
test-fuzz: .venv/.dev
	for round in $$(seq $(ROUNDS)); do \
		seed=$${SEED:-$$(od -An -N4 -tu4 /dev/urandom | tr -d ' ')}; unset SEED; \
		echo "round $$round of $(ROUNDS): SEED=$$seed"; \
		HYPOTHESIS_PROFILE=fuzz $(ONE_THREAD) $(BIN)/python -m pytest -n auto -m hypothesis --hypothesis-seed=$$seed $(ARGS) || exit; \
	done

# Led by coverage (atheris), target by target: make fuzz ARGS='tar npy --runs 20000'
fuzz: .venv/.fuzz
	$(ONE_THREAD) $(BIN)/python tools/fuzz.py $(ARGS)

# Damage to every file of every artefact, and edits of every document; SEED=... draws others, the log tells of each.
test-corruption: .venv/.dev
	SEED=$${SEED:-0} DAMAGES=$${DAMAGES:-1200} USES=$${USES:-99} EDITS=$${EDITS:-1000} $(ONE_THREAD) \
		CORRUPTION_LOG=$${CORRUPTION_LOG:-build/corruption.jsonl} \
		$(BIN)/python -m pytest -n 2 -m slow --show-capture=no tests/corruption $(ARGS)

# The whole demo in a network of its own, in which there is nothing but this machine.
test-offline: .venv/.demo
	unshare --user --map-root-user --net $(BIN)/vilu demo --output build/offline

# Every command broken in every way, TRIALS times, and the long form of several processes at once; SEED repeats, OUT keeps
# a line per trial. As root on Linux, or what needs a mount is skipped.
TRIALS ?= 5
test-faults: .venv/.dev
	seed=$${SEED:-$$(od -An -N3 -tu4 /dev/urandom | tr -d ' ')}; echo "SEED=$$seed"; \
		SEED=$$seed TRIALS=$(TRIALS) $(ONE_THREAD) $(BIN)/python -m pytest -s -rs tests/faults $(ARGS)

# Proofs that take more than ten seconds each: every study in miniature, killed and distributed fits, guarantees simulated.
test-slow: .venv/.dev
	$(ONE_THREAD) $(BIN)/python -m pytest -n auto -m slow $(ARGS)

# What starts Ray and, where Java is, Spark; in every run of the tests there is only one of these.
test-engines: .venv/.engines
	$(ONE_THREAD) $(BIN)/python -m pytest -m engine -rs tests/executors tests/service $(ARGS)

# The tasks for Label Studio, read by its own kit, which needs an older numpy than the rest and so a place of its own.
test-label-studio: .venv/.dev
	[ -d build/label-studio ] || $(BIN)/python -m pip install --quiet --no-compile --target build/label-studio label-studio-sdk
	PYTHONPATH=build/label-studio $(ONE_THREAD) $(BIN)/python -m pytest -m label_studio tests/triage/test_label_studio.py

# What strangers, full disks and other users do to `vilu serve`; then ten thousand requests, drawn from its own description.
# REQUESTS says how many.
test-hostile: .venv/.hostile
	$(ONE_THREAD) $(BIN)/python -m pytest tests/service/test_bad_company.py tests/service/test_trials.py $(ARGS)
	REQUESTS=$${REQUESTS:-10000} $(ONE_THREAD) $(BIN)/python -m pytest -s -m hostile tests/service $(ARGS)

# What stands in deploy/, by promtool and hadolint, which have to be installed.
test-deploy:
	promtool check rules deploy/alerts.yml
	promtool test rules deploy/alerts.test.yml
	hadolint deploy/Containerfile

test-processors: .venv/.dev
	$(BIN)/python tools/processors.py $(ARGS)

# The oldest and the newest of all that we depend on: the lower bounds of pyproject.toml on the oldest Python, with what
# these need in turn as it was at a day when the bounds were young; and what is newest now on the newest Python.
test-lowest: build/lowest/.made
	$(ONE_THREAD) build/lowest/bin/python -m pytest $(ALL_CORES) $(ARGS)

test-newest: build/uv/bin/uv
	$(UV) venv --quiet --allow-existing --python 3.13 build/newest
	$(UV) pip install --quiet --python build/newest --upgrade --editable '.[dev]' --editable $(BENCH)
	$(ONE_THREAD) build/newest/bin/python -m pytest $(ALL_CORES) $(ARGS)

build/lowest/.made: build/uv/bin/uv pyproject.toml $(BENCH)/pyproject.toml
	$(UV) venv --quiet --clear --python 3.11 build/lowest
	$(UV) pip install --quiet --python build/lowest --resolution lowest-direct --exclude-newer 2026-06-15 \
		--exclude-newer-package mapie=2026-10-20 --exclude-newer-package typer=2026-11-28 \
		--exclude-newer-package datasets=2025-07-01 \
		--editable '.[dev]' --editable $(BENCH)
	@touch $@

# What type checkers see of the wheels: a program of someone else, with right uses and wrong ones.
test-types: build/wheel
	$(UV) venv --quiet --clear build/types
	$(UV) pip install --quiet --python build/types build/wheel/*.whl mypy basedpyright
	build/types/bin/mypy --config-file= --strict --cache-dir build/types/cache tests/typed
	build/types/bin/basedpyright --project tests/typed --pythonpath build/types/bin/python

# The wheels in new environments: vilu with no extra, and with each alone; what is missing is said. ARGS names extras.
test-extras: build/wheel
	$(PYTHON) tools/extras.py build/uv/bin/uv build/wheel $(ARGS)

# All that is asked of the wheels themselves.
test-wheels: test-extras test-types

# Artefacts of every kind, written by the wheels if they are not there (tests/compat/write.py), and read by this checkout.
compat: build/wheel .venv/.dev
	$(UV) venv --quiet --clear build/compat
	$(UV) pip install --quiet --python build/compat build/wheel/*.whl
	$(ONE_THREAD) build/compat/bin/python -m tests.compat.write
	$(ONE_THREAD) $(BIN)/python -m pytest tests/compat

# From the source packages, so that nothing comes in from an earlier build.
.PHONY: build/wheel
build/wheel: build/uv/bin/uv
	rm -rf build/wheel
	$(UV) build --quiet --out-dir build/wheel
	$(UV) build --quiet --out-dir build/wheel $(BENCH)

build/uv/bin/uv:
	$(PYTHON) -m venv build/uv
	build/uv/bin/python -m pip install --quiet --disable-pip-version-check uv

lint: .venv/.dev
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/python tools/house.py
	$(BIN)/python tools/sentences.py
	$(BIN)/python tools/examples.py

types: .venv/.dev
	$(BIN)/mypy

format: .venv/.dev
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

# One part trains on the demo's embeddings, and is skipped without them.
bench: .venv/.dev
	[ -f demo-output/results.json ] || $(BIN)/vilu demo
	$(BIN)/python -m benchmarks

bench-gpu: .venv/.dev
	$(BIN)/python -m benchmarks.gpu $(ARGS)

# Known faults of what is installed; asks the network. Builds of torch are audited as the release that they are of.
audit: .venv/.release
	@mkdir -p build
	$(BIN)/python -m pip freeze --exclude-editable | sed 's/+[a-z0-9.]*$$//' >build/installed.txt
	$(BIN)/pip-audit --strict --no-deps --disable-pip --requirement build/installed.txt

# The documentation as a site, in build/site; nothing is loaded from elsewhere, neither here nor by who reads it.
docs: .venv/.docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

# The same, opened in Chromium at two widths, light and dark.
test-docs: docs .venv/.dev
	$(BIN)/python -m pytest -m site tests/test_site.py $(ARGS)

# Both packages, what an installation of each consists of (CycloneDX), and checksums, in dist/. The same commit gives the
# same packages: what is not committed is not in them.
release: export SOURCE_DATE_EPOCH ?= $(shell git log -1 --format=%ct)
release: .venv/.release
	rm -rf dist build/release
	mkdir -p build/release/source && git archive HEAD | tar -x -C build/release/source
	$(BIN)/python -m build --sdist --outdir dist build/release/source
	$(BIN)/python -m build --sdist --outdir dist build/release/source/$(BENCH)
	$(BIN)/python tools/repack.py dist/*.tar.gz
	umask 022; $(BIN)/python -m pip wheel --quiet --disable-pip-version-check --no-cache-dir --no-deps --wheel-dir dist dist/*.tar.gz
	$(BIN)/twine check --strict dist/*.whl dist/*.tar.gz
	$(PYTHON) -m venv build/release/installed
	build/release/installed/bin/python -m pip install --quiet --disable-pip-version-check dist/vilu-*.whl
	$(SBOM) --pyproject pyproject.toml --output-file dist/vilu-sbom.json build/release/installed
	build/release/installed/bin/python -m pip install --quiet --disable-pip-version-check dist/*.whl
	$(SBOM) --pyproject $(BENCH)/pyproject.toml --output-file build/release/vilu-bench-sbom.json build/release/installed
	sed 's#file://[^"]*/dist/##' build/release/vilu-bench-sbom.json >dist/vilu-bench-sbom.json  # no path of this machine
	cd dist && sha256sum *.whl *.tar.gz *.json >SHA256SUMS

clean:
	rm -rf .venv demo-output build dist

.venv/pyvenv.cfg:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "vilu needs Python 3.11 or newer; found $$($(PYTHON) --version). Say: make PYTHON=python3.11 ..." >&2; exit 1; }
	$(PYTHON) -m venv --upgrade-deps .venv  # a new pip takes half of the time of an old one

# Only a tenth of the installed modules is ever imported, and Python compiles these on import. To compile none here
# halves the time of an installation.
.venv/.%: .venv/pyvenv.cfg pyproject.toml $(BENCH)/pyproject.toml
	$(BIN)/python -m pip install --no-compile --quiet --disable-pip-version-check --editable '.[$*]' --editable $(BENCH)
	@touch $@
