# Everything runs in .venv, which the first target builds from pinned versions.
# PYTHON chooses the interpreter: make demo PYTHON=python3.12
PYTHON ?= python3
BIN = .venv/bin
export PIP_DISABLE_PIP_VERSION_CHECK = 1
export PIP_NO_WARN_SCRIPT_LOCATION = 1

.PHONY: demo test test-random test-oldest test-oldest-families test-extras families lint format clean

demo: .venv/installed
	$(BIN)/mipprune demo

test: .venv/installed
	$(BIN)/python -m pytest -n auto --dist loadfile

# Solvers against enumeration on instances drawn anew for a minute; a failure prints its seed, and
# MIPPRUNE_SEED=<seed> repeats it.
test-random: .venv/installed
	MIPPRUNE_RANDOM_SECONDS=60 $(BIN)/python -m pytest -s tests/test_solvers/test_brute_force.py

# What depends on transformers, with the oldest version that is supported.
test-oldest: .venv-oldest/installed
	.venv-oldest/bin/python -m pytest -n auto --dist loadfile $(addprefix tests/test_mipprune/test_, \
		models.py capture.py experts.py gram.py placement.py prune.py job.py checkpoint.py masks.py \
		evaluate.py fuzz.py sequential.py token_weights.py permute.py structured.py latency.py)

# The part of it that says whether every family is captured and pruned.
test-oldest-families: .venv-oldest/installed
	.venv-oldest/bin/python -m pytest -n auto --dist loadfile $(addprefix tests/test_mipprune/test_, \
		models.py capture.py prune.py) -k "family or families or replay or covered"

# Optional extras, each with the packages that it wants, in an environment of its own.
test-extras: .venv-eval/installed .venv-llmcompressor/installed
	.venv-eval/bin/python -m pytest tests/test_mipprune/test_zero_shot.py
	.venv-llmcompressor/bin/python -m pytest tests/test_mipprune/test_llmcompressor.py

# README's table of models, from the list that the tests run.
families: .venv/installed
	cd tests && ../$(BIN)/python families_table.py

lint: .venv/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: .venv/installed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

.venv/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[dev]"
	@$(BIN)/python -c "import solvers; print('Compiled what', len(solvers.prepare()), \
		'solvers need; no later run waits for it.')"
	touch $@

.venv-oldest/installed: pyproject.toml constraints-oldest.txt
	$(PYTHON) -m venv .venv-oldest
	.venv-oldest/bin/python -m pip install --quiet --constraint constraints-oldest.txt \
		--editable ".[dev]"
	touch $@

.venv-eval/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv-eval
	.venv-eval/bin/python -m pip install --quiet --constraint constraints.txt --editable ".[dev,eval]"
	touch $@

# llm-compressor wants older packages than the pins.
.venv-llmcompressor/installed: pyproject.toml
	$(PYTHON) -m venv .venv-llmcompressor
	.venv-llmcompressor/bin/python -m pip install --quiet --editable ".[dev,llmcompressor]"
	touch $@

clean:
	rm -rf .venv .venv-oldest .venv-eval .venv-llmcompressor mipprune-demo
