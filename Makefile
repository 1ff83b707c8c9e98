# make demo: set up and run VRPO on the embedded default;  make test: set up and run the tests
VENV := .venv
PYTHON := $(VENV)/bin/python
DEMO_FLAGS := --beta 0.01 --token-ratio 0.8 --updates 24

.PHONY: demo test check format model docs

demo: $(VENV)/installed
	$(PYTHON) vrpo_math.py $(DEMO_FLAGS)

test: export PYTHONDONTWRITEBYTECODE = # the programs that tests start share what is compiled
test: $(VENV)/developing
	$(PYTHON) -m pytest

check: $(VENV)/developing
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/ruff check .

format: $(VENV)/developing
	$(VENV)/bin/ruff format .
	$(VENV)/bin/ruff check --fix .

model: $(VENV)/installed
	$(PYTHON) -m assets.make.tiny_math
	$(PYTHON) -m assets.make.tiny_long # goes on from tiny_math
	$(PYTHON) -m assets.make.tiny_science
	$(PYTHON) -m assets.make.tiny_dialogue
	$(PYTHON) -m utils.reward_model --device cpu

docs: $(VENV)/installed
	$(VENV)/bin/pip install --quiet -e '.[docs]'
	$(PYTHON) -m docs.build_lesson
	$(VENV)/bin/zensical build --clean --strict

$(VENV)/installed: requirements.txt
	python3 -m venv $(VENV)
	$(VENV)/bin/pip install --quiet -r requirements.txt
	touch $@

$(VENV)/developing: $(VENV)/installed pyproject.toml
	$(VENV)/bin/pip install --quiet -e '.[dev,track]'
	touch $@
