.DEFAULT_GOAL := help
SHELL := /bin/bash
BIN := .venv/bin
PYTEST_ARGS ?=
PROSE := README.md CONTRIBUTING.md deploy/README.md deploy/envoy/README.md examples/README.md $(wildcard docs/*.md)

.PHONY: help setup check test demo docs bench soak mutants proto proto-baseline clean

help:  ## List the targets
	@echo "steerllm: an LLM on vLLM over gRPC, with per-request steering and hidden-state capture"
	@echo
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /\t/' | expand -t 16

setup:  ## Create .venv with everything; does nothing the second time (PYTHON=... picks the interpreter)
	@.ci/setup

check: setup  ## Format, lint, types, import order, prose, contract (lint, no breaking change), generated stubs
	$(BIN)/ruff format --check
	$(BIN)/ruff check
	$(BIN)/mypy
	$(BIN)/lint-imports --no-logo
	$(BIN)/python .ci/check_prose.py $(PROSE) --commands
	$(BIN)/buf lint
	$(BIN)/buf breaking --against proto/baseline.binpb
	$(BIN)/python -m steer_service.wire.regenerate --check

test: setup  ## Run the tests (PYTEST_ARGS="-k name" selects some)
	.ci/test $(PYTEST_ARGS)

demo: setup  ## Steer, cap and ablate a small model in one batch, through a server
	$(BIN)/steer demo

docs: setup  ## Build the site of the documentation in site/; a broken link is an error
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet
	@echo "site/index.html; to search: $(BIN)/python -m http.server --directory site"

bench: setup bench/.peers  ## Compare with stock vLLM, its servers, transformers and bare gRPC; writes bench/results.json
	$(BIN)/python -m bench --minutes 20
	$(BIN)/python -m bench.service --minutes 10 --out bench/results.json
	$(BIN)/python -m bench.first_token --out bench/results.json
	$(BIN)/python -m bench.scaling --out bench/results.json --plot docs/scaling.png
	$(BIN)/python -m bench.startup --out bench/results.json
	$(BIN)/python -m bench.hf_hooks --out bench/results.json
	$(BIN)/python -m bench.captures --out bench/results.json
	$(BIN)/python -m bench.hf_train --out bench/results.json

soak: setup  ## Load, abuse and faults against server and client processes (about 20 minutes); prints the figures of docs/reliability.md
	.ci/private-shm $(BIN)/python -m bench.soak $(SOAK_ARGS)

mutants: setup  ## Put faults into the guards, one after the other, and demand that the named tests fail (about 20 minutes)
	$(BIN)/python -m tests.mutants $(MUTANT_ARGS)

bench/.peers:
	$(BIN)/pip install --quiet --no-deps --target $@ smg-grpc-servicer smg-grpc-proto

proto: setup  ## Regenerate the stubs after a change in proto/
	$(BIN)/python -m steer_service.wire.regenerate

proto-baseline: setup  ## Make today's contract the one that `make check` protects from breaking changes
	$(BIN)/buf build --exclude-source-info -o proto/baseline.binpb

clean:  ## Remove .venv, caches and build outputs (keeps the converted model)
	rm -rf .venv bench/.peers examples/node/node_modules examples/web/node_modules examples/c/read_segment build dist site *.egg-info .pytest_cache .ruff_cache .mypy_cache .import_linter_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
