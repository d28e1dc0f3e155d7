# make demo · test · bench · lint · gpu · leaderboard. All but gpu build .venv if it is missing or out of date.
PYTHON ?= python3
BIN := .venv/bin
READY := .venv/.ready

.PHONY: demo test bench lint gpu leaderboard schema lock clean

$(READY): setup.py constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet -c constraints.txt torch==2.13.0
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[all,dev]'
	touch $(READY)

demo: $(READY)
	$(BIN)/lmp_trainer --exp modern --training-plan sketch --amp
	$(BIN)/lmp_trainer --exp modern_value_norm --training-plan sketch --amp
	$(BIN)/lmp_plotstats gpt_out/sketch --out gpt_out/plots

test: lint
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 2 --dist worksteal --durations=15

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: $(READY)
	$(BIN)/python benchmarks/train_speed.py
	$(BIN)/python benchmarks/market_speed.py

# make leaderboard ROW=gqa judges an idea as docs/results.md says; ROW=all judges every idea.
leaderboard: $(READY)
	$(BIN)/python benchmarks/leaderboard.py run $(ROW) --workers 2

# With the torch that is installed, which knows the card; a .venv would bring its own.
gpu:
	$(PYTHON) benchmarks/gpu.py

schema: $(READY)
	$(BIN)/python -m lmplay.plan > training_plans/plan.schema.json

lock: $(READY)
	echo "# Pinned versions for a reproducible .venv; 'make lock' writes them anew." > constraints.txt
	$(BIN)/python -m pip freeze --exclude-editable | sed 's/+cpu//' >> constraints.txt

clean:
	rm -rf .venv build dist *.egg-info
