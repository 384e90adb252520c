# Shortcuts for people who have make; the README's two commands need no more than Python.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: setup run test fast mutants lint census export readme lab clean

setup: $(BIN)/.installed
$(BIN)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install -q -c constraints.txt -e ".[dev]"
	touch $@

run: setup        ## the main job: a private fine-tune of the embedded model
	$(BIN)/papermill --log-output nbs/run_experiment.ipynb results/run.ipynb

test: setup       ## everything that is checked
	$(BIN)/python -m pytest

fast: setup       ## what is checked in two minutes, for whoever edits
	$(BIN)/python -m pytest -m "not slow"

mutants: setup    ## wrong versions of the library: does a test notice each of them? (half an hour)
	$(BIN)/python tools/mutants

lint: setup       ## style: ruff over modules and notebooks, and the bounds of the house
	$(BIN)/ruff check paczero nbs tests tools
	$(BIN)/python tools/census.py

census: setup     ## the house, counted
	$(BIN)/python tools/census.py --summary

export: setup     ## notebooks -> library, cleaned, and README.md from nbs/index.ipynb
	$(BIN)/nbdev_export
	$(BIN)/nbdev_clean
	$(BIN)/python tools/readme.py --write

readme: setup     ## README.md from nbs/index.ipynb
	$(BIN)/python tools/readme.py --write

lab: setup        ## read and run the notebooks
	$(BIN)/jupyter lab nbs

clean:
	rm -rf .venv build *.egg-info .pytest_cache .hypothesis .ruff_cache
