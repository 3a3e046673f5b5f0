# `make quickstart` and `make test` need only Python 3.11 to 3.13, pip and make.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: quickstart test test-slow test-ranks test-gpu golden faults families templates bench-data bench-dpo bench-pretrain bench-sft bench-time-to-loss bench-scaling bench-saving bench-head bench-plan bench-kernel-cache parity-trl real check format docs clean

.venv/bin/python:
	$(PYTHON) -m venv .venv

.venv/.installed: pyproject.toml constraints.txt | .venv/bin/python
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable .
	touch $@

.venv/.installed-dev: .venv/.installed
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@

.venv/.installed-bench: .venv/.installed
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[bench]'
	touch $@

quickstart: .venv/.installed  ## the whole pipeline on the built-in world, in minutes, on a CPU
	$(BIN)/modern-llm run configs/quickstart.yaml

test: .venv/.installed-dev  ## every test but the slow ones
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal -m "not slow and not faults"

test-slow: .venv/.installed-dev  ## the tests that take minutes
	$(BIN)/python -m pytest -m slow

test-ranks: .venv/.installed-dev  ## whole runs under torchrun: the quickstart on two ranks, a killed rank
	$(BIN)/python -m pytest -m ranks -s

test-gpu: .venv/.installed-dev  ## the tests of what only a GPU runs; all others hide the GPUs
	TEST_ON_GPU=1 $(BIN)/python -m pytest tests/models/test_varlen.py

golden: .venv/.installed-dev  ## record this machine's golden runs anew; look at the diff, and give the reason for it
	$(BIN)/python tests/golden/runs.py

faults: .venv/.installed-dev  ## runs killed, signalled, damaged and refused by the disk, hundreds of times; prints its counts
	FAULT_KILLS=200 FUZZ_CASES=10000 OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/faults -s

families: .venv/.installed-dev  ## every model family of transformers, built tiny, damaged and trained; writes docs/families.md
	OMP_NUM_THREADS=1 $(BIN)/python tests/families_sweep.py $(ARGS)

templates: .venv/.installed-dev  ## which chat templates of ARGS="FOLDER …" can be trained on; writes docs/templates.md
	$(BIN)/python tests/templates_sweep.py $(ARGS)

bench-data: .venv/.installed  ## data preparation against `datasets.map`; the last line is JSON
	$(BIN)/python experiments/benchmarks/data/run.py

bench-dpo: .venv/.installed-bench  ## preference training against TRL, with ARGS="…" for options; the last line is JSON
	$(BIN)/python experiments/benchmarks/dpo/run.py $(ARGS)

bench-pretrain: .venv/.installed-bench  ## pretraining against transformers.Trainer, with ARGS="…" for options; the last line is JSON
	$(BIN)/python experiments/benchmarks/pretrain/run.py $(ARGS)

bench-sft: .venv/.installed-bench  ## supervised fine-tuning against TRL, with ARGS="…" for options; the last line is JSON
	$(BIN)/python experiments/benchmarks/sft/run.py $(ARGS)

bench-time-to-loss: .venv/.installed-bench  ## when a loss is reached, against transformers.Trainer; ARGS="--plot FILE" draws it
	$(BIN)/python experiments/benchmarks/time_to_loss/run.py $(ARGS)

bench-scaling: .venv/.installed  ## cost at 1×, 4× and 16× the rows, with ARGS="…" for options; the last line is JSON
	$(BIN)/python experiments/benchmarks/scaling/run.py $(ARGS)

bench-saving: .venv/.installed  ## what checkpoints cost a run; the last line is JSON
	$(BIN)/python experiments/benchmarks/saving/run.py $(ARGS)

bench-head: .venv/.installed  ## log-probs from hidden states: ours, torch's, plain; the last line is JSON
	$(BIN)/python experiments/benchmarks/head/run.py

bench-plan: .venv/.installed  ## memory and time as `plan` foresees them, against five runs; the last line is JSON
	$(BIN)/python experiments/benchmarks/plan/run.py $(ARGS)

bench-kernel-cache: .venv/.installed  ## memory and speed by the number of kernels that oneDNN keeps; the last line is JSON
	$(BIN)/python experiments/benchmarks/kernel_cache/run.py $(ARGS)

parity-trl: .venv/.installed-bench  ## five steps of SFT and DPO with LoRA here and in TRL, loss by loss; ARGS="--model FOLDER"
	$(BIN)/python experiments/benchmarks/parity_trl/run.py $(ARGS)

real: .venv/.installed  ## SFT and DPO of a real 135M model: DATA="DEMONSTRATIONS PAIRS", or a folder with sft.* and dpo.*
	$(if $(DATA),,$(error DATA is missing: make real DATA="DEMONSTRATIONS PAIRS", or DATA=FOLDER with one sft.* and one dpo.* file))
	$(BIN)/python experiments/real/make_model.py models/smollm2-135m-instruct
	$(BIN)/python experiments/real/run.py --model models/smollm2-135m-instruct --data $(DATA) $(ARGS)

check: .venv/.installed-dev  ## lint, format, types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

format: .venv/.installed-dev  ## put the code in its form
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: .venv/.installed-dev  ## the documentation site, warnings are errors
	$(BIN)/mkdocs build --strict

clean:  ## everything that can be made again, runs excepted
	rm -rf .venv site *.egg-info .pytest_cache .ruff_cache .hypothesis
