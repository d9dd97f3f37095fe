# One command a chore; `make help` lists them. Set-up happens by itself and is skipped when current.

PYTHON ?= python3
MODEL ?= smollm2
PROMPT ?= What is the capital of France?
ARGS ?=
JOBS ?= 2
export PROMPT

VENV := .venv/bin
WORKSPACE := core cli builtin_models tests .ci

.DEFAULT_GOAL := help
.PHONY: help run test test-slow lint format wheels clean setup-run setup-dev

help: ## list the commands
	@grep -hE '^[a-z-]+:.*## ' Makefile | sed -E 's/:.*## /\t/' | expand -t 12

run: setup-run ## a model answers: make run PROMPT="..." ARGS="--temperature 0.7" MODEL=smollm2
	@$(VENV)/llmfw run --model "$(MODEL)" --chat --prompt "$$PROMPT" --temperature 0 $(ARGS)

test: setup-dev ## all tests but the slow ones, JOBS processes at a time
	$(VENV)/python -m pytest --numprocesses $(JOBS) $(ARGS)

test-slow: setup-dev ## the slow tests
	$(VENV)/python -m pytest -m slow $(ARGS)

lint: setup-dev ## ruff, ruff format, mypy strict, import-linter
	$(VENV)/ruff check .
	$(VENV)/ruff format --check .
	$(VENV)/mypy
	$(VENV)/lint-imports

format: setup-dev ## mend what ruff can mend
	$(VENV)/ruff check --fix .
	$(VENV)/ruff format .

wheels: setup-dev ## build every package's wheel into dist/, from what is installed
	rm -rf dist
	for package in core cli builtin_models/*/; do \
	    rm -rf "$$package/build"; \
	    $(VENV)/python -m build --quiet --wheel --no-isolation --outdir dist "$$package" || exit 1; \
	    rm -rf "$$package/build"; \
	done
	@ls dist

clean: ## remove what was built and cached; .venv stays
	rm -rf dist .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache
	find core cli builtin_models tests -name __pycache__ -prune -exec rm -rf {} +
	find core cli builtin_models -name build -type d -prune -exec rm -rf {} +

setup-run:
	@$(PYTHON) .ci/setup.py run

setup-dev:
	@$(PYTHON) .ci/setup.py dev
