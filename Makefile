# Two commands on a fresh machine do everything: `make demo` and `make test`.
PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin

.PHONY: demo test soak bench lint format clean

demo: $(VENV)/runtime-installed
	$(BIN)/python src/demo.py

test: $(VENV)/dev-installed
	$(BIN)/python -m pytest tests

soak: $(VENV)/dev-installed
	SOAK=1 $(BIN)/python -m pytest tests/test_resume.py tests/test_fuzz.py -k "killed_at_any_point or fuzz"

bench: $(VENV)/runtime-installed
	$(BIN)/python bench/run.py

lint: $(VENV)/dev-installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: $(VENV)/dev-installed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) demo

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/runtime-installed: requirements.txt | $(BIN)/python
	$(BIN)/python -m pip install --quiet -r requirements.txt
	touch $@

$(VENV)/dev-installed: requirements-dev.txt $(VENV)/runtime-installed
	$(BIN)/python -m pip install --quiet -r requirements-dev.txt
	touch $@
