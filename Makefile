# Two commands: `make demo` and `make test`. Each makes the virtual environment it needs.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: test demo lint clean

test: $(VENV)/.dev
	$(BIN)/pytest -m "not slow and not peers"

# The reference weights are random: this shows that everything runs, not what a trained model sees.
demo: $(VENV)/.demo
	rm -rf demo
	$(BIN)/python tests/reference/build_checkpoints.py demo/sources
	$(BIN)/sa2va-i convert demo/sources/sa2va demo/model --sam2 demo/sources/sam2.pt --sam2-config tests/reference/sam2_config.json
	$(BIN)/sa2va-i segment tests/reference/video "the red circle" --model demo/model -o demo/out
	@echo "The masks are noise: these weights are random. Watch demo/out/overlay.mp4"

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
