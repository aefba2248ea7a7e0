# Two commands: `make demo` and `make test`. Each makes the virtual environment it needs.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: test demo lint clean

test: $(VENV)/.dev
	$(BIN)/pytest -m "not slow and not peers"

# The small model knows drawn shapes; there are three circles, and the sentence needs several frames to be understood.
demo: $(VENV)/.demo
	rm -rf demo
	$(BIN)/sa2va-i segment space/examples/shapes.mp4 "the circle moving right" --model small -o demo
	@echo "Watch demo/overlay.mp4"

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

$(VENV)/.demo: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -q -c constraints.txt -e .
	touch $@

$(VENV)/.dev: $(VENV)/.demo
	$(BIN)/pip install -q -c constraints.txt -e ".[dev]"
	touch $@

clean:
	rm -rf $(VENV) demo build dist *.egg-info
