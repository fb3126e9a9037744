# `make help` lists what there is. Every target sets .venv up first, which takes no time once it fits the lock.
SHELL := bash
.DEFAULT_GOAL := help
python := .venv/bin/python

.PHONY: help setup quickstart test unit e2e browser contract lint format reference docs sweep study lock \
	bench bench-update bench-step bench-overhead bench-growth bench-scale

help: ## this list
	@grep -hE '^[a-z0-9-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z0-9-]+):.*## /  make \1\t/' | expand -t 24

setup: ## make .venv from the lock
	@scripts/setup.sh

quickstart: setup ## train a tiny language model with GRPO, a few minutes on two cores
	@PATH="$(CURDIR)/.venv/bin:$$PATH" examples/quickstart/run.sh $(ARGS)

# An engine inside the test process changes it for good (vLLM silences loggers and pins threads): those run apart.
test: lint unit e2e ## lint and all tests but those of `make contract`

unit: setup ## the tests that start no engine
	$(python) -m pytest -q -n 2 tests --ignore=tests/e2e $(ARGS)

e2e: setup ## the tests with Ray and a real vLLM engine; one at a time, each keeps two cores busy
	$(python) -m pytest -q tests/e2e $(ARGS)

browser: ## install the Chromium in which tests open `verl report`, on Debian, as root
	apt-get update && apt-get install -y chromium

contract: setup ## the code of three vllm-ascend releases under a stand-in for torch_npu; downloads them once
	$(python) -m pytest -q -m contract tests/contract $(ARGS)

lint: setup ## ruff and the import contracts
	$(python) -m ruff check .
	$(python) -m ruff format --check .
	.venv/bin/lint-imports --no-cache

format: setup ## let ruff mend what it can
	$(python) -m ruff check --fix .
	$(python) -m ruff format .

reference: setup ## write the YAML files and docs/config.md from the config dataclasses
	$(python) -m verl.config.write_yaml
	$(python) -m verl.config.write_reference

docs: setup ## the documentation as a site, in build/site; a broken link is an error
	@NO_MKDOCS_2_WARNING=1 .venv/bin/mkdocs build && echo "open build/site/index.html"

bench: setup ## benchmarks that take minutes; each prints a table
	@for benchmark in quantizer weight_update generation overhead scale_model; do \
		$(python) benchmarks/$$benchmark.py || exit 1; done

bench-update: setup ## weight updates against copying their bytes; writes its table into docs/performance.md
	$(python) benchmarks/weight_update.py --write docs/performance.md $(ARGS)

bench-step: setup ## a GRPO step against TRL's; writes its table into docs/performance.md
	$(python) benchmarks/grpo_step.py --write docs/performance.md $(ARGS)

bench-overhead: setup ## the share of a step in which nothing computes; writes its table into docs/performance.md
	$(python) benchmarks/overhead.py --write docs/performance.md $(ARGS)

bench-growth: setup ## times and memory over sizes, samples and processes; writes its tables into docs/performance.md
	$(python) benchmarks/growth.py --write docs/performance.md $(ARGS)

bench-scale: setup ## a time model against this machine, and for Ascend 950; writes its tables into docs/performance.md
	$(python) benchmarks/scale_model.py --write docs/performance.md $(ARGS)

sweep: setup ## every estimator and loss on the quickstart's task; writes its table into docs/algorithms.md
	$(python) benchmarks/sweep.py --write docs/algorithms.md $(ARGS)

study: setup ## rollouts with and without correction; writes table and picture of docs/rollout_correction.md
	$(python) benchmarks/correction_study.py --write docs/rollout_correction.md --picture docs/rollout_correction.png $(ARGS)

lock: setup ## resolve requirements/cpu.lock anew
	@scripts/lock.sh
