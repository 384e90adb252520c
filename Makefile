# Shortcuts for people who have make; the README's two commands need no more than Python.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: setup run test export lab clean

setup: $(BIN)/.installed
$(BIN)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install -q -c constraints.txt -e ".[dev]"
	touch $@

run: setup        ## the main job: a private fine-tune of the embedded model
	$(BIN)/papermill --log-output nbs/run_experiment.ipynb results/run.ipynb

test: setup       ## everything that is checked
	$(BIN)/python -m pytest

export: setup     ## notebooks -> library, cleaned, and README.md from nbs/index.ipynb
	$(BIN)/nbdev_export && $(BIN)/nbdev_clean && $(BIN)/python tests/readme.py --write

lab: setup        ## read and run the notebooks
	$(BIN)/jupyter lab nbs

clean:
	rm -rf .venv build *.egg-info .pytest_cache .hypothesis
