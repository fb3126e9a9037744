# `make help` lists the targets. Every target first sets up .venv, which takes no time if it already matches the lock.
SHELL := bash
.DEFAULT_GOAL := help
python := .venv/bin/python

.PHONY: help setup quickstart test test-all unit unit-slow e2e e2e-short e2e-rest browser contract contract-table lint types format \
	reference docs scripts-table sweep study lock models campaign campaign-input soak bench bench-update bench-step bench-overhead bench-growth bench-scale

help: ## print this list
	@grep -hE '^[a-z0-9-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z0-9-]+):.*## /  make \1\t/' | expand -t 24

setup: ## create .venv from the lock
	@scripts/setup.sh

quickstart: setup ## train a tiny language model with GRPO, a few minutes on two cores
	@PATH="$(CURDIR)/.venv/bin:$$PATH" examples/quickstart/run.sh $(ARGS)

# One after the other: Ray connects to a cluster that runs on the machine already.
test: lint unit e2e-short ## lint, unit tests and a short end-to-end set; 12 minutes at most on two cores

test-all: test types unit-slow e2e-rest ## all tests except those of `make contract`

unit_tests := $(python) -m pytest -q -n 2 --dist worksteal tests --ignore=tests/e2e

unit: setup ## unit tests: those that start no vLLM engine, but the slowest
	$(unit_tests) -m "not slow and not contract" $(ARGS)

unit-slow: setup ## the unit tests that are not in `make test`: further cases of what it checks
	$(unit_tests) -m "slow and not contract" $(ARGS)

# An engine changes the process that starts it (vLLM silences loggers): engines never run in the process of unit tests.
# Start-up takes most of an end-to-end test and keeps one core busy, so two tests run at a time.
end_to_end := $(python) -m pytest -q -n 2 tests/e2e

e2e: setup ## end-to-end tests: Ray and a real vLLM engine
	$(end_to_end) $(ARGS)

e2e-short: setup ## the end-to-end tests of `make test`: start, learn, update in MXFP8, resume, stop
	$(end_to_end) -m smoke $(ARGS)

e2e-rest: setup ## the end-to-end tests that are not in `make test`
	$(end_to_end) -m "not smoke" $(ARGS)

browser: ## install the Chromium in which tests open `verl report`; on Debian, as root
	apt-get update && apt-get install -y chromium

contract: setup ## run the code of five vllm-ascend releases with a stand-in for torch_npu; downloads them once
	$(python) -m pytest -q -m contract tests/contract $(ARGS)

contract-table: setup ## write docs/ascend_compatibility.md from the results of the last `make contract`
	$(python) tests/contract/vllm_ascend/feature_table.py

lint: setup ## ruff, import contracts, import circles and the word list
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/lint-imports --no-cache
	.venv/bin/python scripts/import_graph.py --check
	scripts/lint_words.sh

types: setup ## mypy
	.venv/bin/mypy

format: setup ## apply the fixes of ruff
	$(python) -m ruff check --fix .
	$(python) -m ruff format .

reference: setup ## write the YAML files and docs/config.md from the config dataclasses
	$(python) -m verl.config.write_yaml
	$(python) -m verl.config.write_reference

scripts-table: setup ## check upstream verl's scripts in CHECKOUT=folder; writes the table of docs/migrating.md
	@$(python) scripts/upstream_scripts.py "$(CHECKOUT)" $(ARGS)

docs: setup ## build the documentation into build/site; a broken link is an error
	@NO_MKDOCS_2_WARNING=1 .venv/bin/mkdocs build && echo "open build/site/index.html"

campaign: setup ## faults in real runs until there were 1,000; hours; `ARGS="--faults 50"` for fewer
	$(python) -m campaign.faults --write docs/reliability.md $(ARGS)

soak: setup ## a run of 10,000 steps, hours, and what grows in it; `ARGS="--steps 500"` for fewer
	$(python) -m campaign.soak --write docs/reliability.md $(ARGS)

models: setup ## train a tiny model of each architecture; writes the table of docs/models.md, half an hour
	$(python) benchmarks/model_table.py --write docs/models.md $(ARGS)

campaign-input: setup ## give verl bad input of every kind; writes the table of docs/reliability.md, half an hour
	$(python) -m campaign input --write docs/reliability.md $(ARGS)

bench: setup ## run the benchmarks that take minutes; each prints a table
	@for benchmark in quantizer weight_update generation overhead scale_model; do \
		$(python) benchmarks/$$benchmark.py || exit 1; done

bench-update: setup ## compare weight updates with a copy of their bytes; writes its table into docs/performance.md
	$(python) benchmarks/weight_update.py --write docs/performance.md $(ARGS)

bench-step: setup ## compare a GRPO step with TRL's; writes its table into docs/performance.md
	$(python) benchmarks/grpo_step.py --write docs/performance.md $(ARGS)

bench-overhead: setup ## measure the share of a step without computation; writes its table into docs/performance.md
	$(python) benchmarks/overhead.py --write docs/performance.md $(ARGS)

bench-growth: setup ## measure times and memory by sizes, samples, processes; writes its tables into docs/performance.md
	$(python) benchmarks/growth.py --write docs/performance.md $(ARGS)

bench-scale: setup ## compare a time model with this machine; writes its tables into docs/performance.md
	$(python) benchmarks/scale_model.py --write docs/performance.md $(ARGS)

sweep: setup ## train the quickstart with each estimator and loss; writes its table into docs/algorithms.md
	$(python) benchmarks/sweep.py --write docs/algorithms.md $(ARGS)

study: setup ## compare runs with and without quantization, correction and QAT; writes docs/quantized_rollout.md
	$(python) benchmarks/rollout_study.py --write docs/quantized_rollout.md $(ARGS)

lock: setup ## resolve requirements/cpu.lock again
	@scripts/lock.sh
