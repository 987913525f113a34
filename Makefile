# make demo  - install into .venv and walk the whole pipeline on the tiny Llama 3
# make test  - install into .venv and run the tests
PYTHON ?= python3
BIN := .venv/bin
READY := .venv/.ready

.PHONY: setup demo test explore check bench bench-ppo seeds wheel clean

setup: $(READY)

$(READY): pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable ".[dev]"
	touch $(READY)

demo: $(READY)
	$(BIN)/align run recipes/tiny/pipeline.yaml

# ZeRO-3 is tested too, where DeepSpeed can be installed: it asks for torch while it is built, and compiles nothing here.
.venv/.deepspeed: $(READY)
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt setuptools wheel
	DS_BUILD_OPS=0 $(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt --no-build-isolation deepspeed \
	  && touch $@ || echo "DeepSpeed could not be installed: the tests of ZeRO-3 are left out"

test: $(READY) .venv/.deepspeed
	$(BIN)/python -m pytest -n 2 -m "not slow"
	$(BIN)/python -m pytest -n 2 -m slow

explore: $(READY)  # the property tests on new random examples, ten times over
	for turn in 1 2 3 4 5 6 7 8 9 10; do \
	  HYPOTHESIS_PROFILE=explore $(BIN)/python -m pytest -n 2 -m "not slow" $$(grep -rl "from hypothesis" tests --include="test_*.py") || exit 1; \
	done

check: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: $(READY)  # side by side with what align stands on; results in benchmarks/results/
	$(BIN)/python benchmarks/startup.py
	$(BIN)/python benchmarks/generation.py
	$(BIN)/python benchmarks/pairs.py

bench-ppo: $(READY)  # PPO against TRL 1.12, which gets an environment of its own
	$(PYTHON) -m venv .venv-trl
	.venv-trl/bin/pip install --quiet --disable-pip-version-check torch==2.13.0 trl==1.12.0 peft
	$(BIN)/python benchmarks/ppo.py --trl .venv-trl/bin/python

seeds: $(READY)  # the quality claims: the tiny pipeline over three seeds (about 20 minutes)
	$(BIN)/python benchmarks/seeds.py

wheel: $(READY)
	$(BIN)/pip wheel --quiet --no-deps --wheel-dir dist .

clean:
	rm -rf .venv .venv-trl build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis
