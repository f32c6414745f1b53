# Every job a person runs; `make help` lists them.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
MODELS_FILE ?= models.toml
REPOSITORY ?= model_repository
HTTP_PORT ?= 8000
GRPC_PORT ?= 8001
METRICS_PORT ?= 8002
GATEWAY_PORT ?= 8080
MINUTES ?= 15
MODEL ?=
VARIANTS ?=
SOURCE ?=
FORCE ?=
BESIDE ?=
SERVICE ?= trident
WATCHERS ?= prometheus grafana collector
PYTEST_ARGS ?=
LOAD_ARGS ?=
UPDATE ?=
EXAMPLES ?= 5000
CHECKOUT ?=
WRITE ?=
TEST_WORKERS ?= 4
# The tests start hundreds of processes of ours, of which none need compile what it imports: not even where
# PYTHONDONTWRITEBYTECODE keeps them from storing it.
COMPILED = $(BIN)/python -m compileall -q client export gateway serving
# A worker that dies ends the run and is told: to replace it, pytest-xdist 3.8 may wait for ever.
WORKERS = --numprocesses $(TEST_WORKERS) --max-worker-restart 0
# A path as one word of the shell, whatever it holds; `~/` at its beginning is still a home.
quoted = $(if $(1),$(subst '~/,~/','$(subst ','\'',$(1))'))
TABLES = --models-file $(call quoted,$(MODELS_FILE)) --repository $(call quoted,$(REPOSITORY))
SETUP := $(VENV)/.ready
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: help setup serve export test test-all check audit schema format docs quality families bench load load-check soak fuzz clients upstream charts replicas image up down clean
.DEFAULT_GOAL := help

help: ## list the jobs
	@awk -F ':.*## ' '/^[a-z-]+:.*## /{printf "  make %-10s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: $(SETUP) ## create .venv with the pinned packages

$(SETUP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; sys.exit(0 if v in ((3, 11), (3, 12)) else f"trident: Python {v[0]}.{v[1]} is not supported: use 3.11 or 3.12 (make PYTHON=python3.11 ...)")'
	@echo "trident: installing the pinned packages into $(VENV)" >&2
	@$(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip install --quiet --no-compile --constraint constraints.txt --editable '.[dev]'
	@touch $@

PORTS := --http-port $(HTTP_PORT) --grpc-port $(GRPC_PORT) --metrics-port $(METRICS_PORT) --gateway-port $(GATEWAY_PORT)

serve: $(SETUP) ## export what is missing, then serve on 127.0.0.1 until Ctrl-C
	@$(BIN)/python -m trident_serving --check $(PORTS) > /dev/null
	@$(BIN)/python -m trident_export export --keep-going $(if $(FORCE),--force) $(TABLES)
	@exec $(BIN)/python -m trident_serving --repository $(call quoted,$(REPOSITORY)) $(PORTS)

export: $(SETUP) ## export models: make export [MODEL=name [VARIANTS=all] [SOURCE=folder] [FORCE=1] [BESIDE=1]]
	@$(BIN)/python -m trident_export export $(MODEL) $(if $(VARIANTS),--variants $(call quoted,$(VARIANTS))) $(if $(SOURCE),--source $(call quoted,$(SOURCE))) $(if $(FORCE),--force) $(if $(BESIDE),--beside) $(TABLES)

test: $(SETUP) ## run the tests, against a real server on free ports
	@$(COMPILED)
	@$(BIN)/python -m pytest $(WORKERS) $(PYTEST_ARGS)

test-all: $(SETUP) ## run the slow tests as well: more variants and families of what `make test` shows
	@$(COMPILED)
	@$(BIN)/python -m pytest $(WORKERS) -m 'not image and not clients and not charts and not replicas' $(PYTEST_ARGS)

check: $(SETUP) ## lint, types, configs in step with models.toml, deployment files
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy
	@$(BIN)/mypy --python-version 3.10 --package trident_client --package trident_command
	@$(BIN)/mypy --python-version 3.10 examples
	@$(BIN)/python tools/schema.py --check
	@$(BIN)/python -m trident_export configs --check $(TABLES)
	@$(BIN)/python deploy/validate.py
	@$(BIN)/python tools/lock.py --check

audit: $(SETUP) ## ask for known vulnerabilities of the pinned packages, and look for secrets; needs the network
	@$(BIN)/python tools/audit.py $(if $(UPDATE),--update)

schema: $(SETUP) ## write what comes from trident_serving.schema: the client's options, tables of the reference
	@$(BIN)/python tools/schema.py
	@$(BIN)/ruff format --quiet client/trident_client/_options.py

format: $(SETUP) ## format the code
	@$(BIN)/ruff format .
	@$(BIN)/ruff check --fix .

docs: $(SETUP) ## build the documentation as a site, links checked -> site/
	@$(BIN)/python -m pip install --quiet --no-compile --constraint constraints.txt --editable '.[docs]'
	@NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict
	@echo "trident: the documentation is in site/index.html" >&2

quality: $(SETUP) ## what each exported variant gets wrong and costs -> reports/quality.{md,json,svg}
	@$(BIN)/python -m trident_export evaluate $(MODEL) $(TABLES)

families: $(SETUP) ## which model types are served, each compared with Hugging Face -> docs/reference/families.md
	@OMP_NUM_THREADS=1 $(BIN)/python tools/families.py --write docs/reference/families.md

bench: $(SETUP) ## compare with other libraries, all in one run: make bench [PEERS="openvino-genai ..."] -> reports/bench.md
	@$(BIN)/python -m benchmarks.bench --repository $(call quoted,$(REPOSITORY)) $(if $(PEERS),--peers $(PEERS))

load: $(SETUP) ## throughput and latency of every model at every door, verified: make load [LOAD_ARGS=...] -> reports/load.md
	@$(BIN)/python -m benchmarks.load --repository $(call quoted,$(REPOSITORY)) $(LOAD_ARGS)

load-check: $(SETUP) ## compare ratios of throughput with stored ones: make load-check [UPDATE=1] [LOAD_ARGS=...]
	@$(BIN)/python -m benchmarks.load --check $(if $(UPDATE),--update) --repository $(call quoted,$(REPOSITORY)) $(LOAD_ARGS)

soak: $(SETUP) ## mixed traffic, faults and hostile requests, all verified: make soak [MINUTES=15] -> reports/soak.md
	@$(BIN)/python -m trident_export export smollm2 --variants all $(TABLES)
	@$(BIN)/python -m trident_export export $(TABLES)
	@$(BIN)/python -m benchmarks.soak --minutes $(MINUTES) --repository $(call quoted,$(REPOSITORY))

fuzz: $(SETUP) ## thousands of random requests, answers and bodies: make fuzz [EXAMPLES=5000]
	@FUZZ_EXAMPLES=$(EXAMPLES) $(BIN)/python -m pytest --timeout 0 tests/fuzz $(PYTEST_ARGS)

clients: $(SETUP) ## run other people's clients against the default models and the gateway
	@$(BIN)/python -m pytest -m clients tests/clients $(PYTEST_ARGS)

upstream: $(SETUP) ## run Triton's own tests: make upstream CHECKOUT=folder of triton-inference-server/server
	@$(BIN)/python -m tests.upstream $(call quoted,$(CHECKOUT)) $(if $(WRITE),--write docs/reference/upstream-tests.md)

charts: $(SETUP) ## render the Helm chart and validate what it gives
	@$(BIN)/python -m pytest -m charts tests/charts $(PYTEST_ARGS)

replicas: $(SETUP) ## three servers behind Envoy and the gateway, killed, frozen, drained: make replicas [MINUTES=10]
	@REPLICAS_MINUTES=$(if $(findstring file,$(origin MINUTES)),,$(MINUTES)) $(BIN)/python -m pytest -m replicas tests/replicas $(PYTEST_ARGS)

image: $(SETUP) ## build the images and run them, where podman is
	@$(BIN)/python -m pytest -m image tests/images $(PYTEST_ARGS)

up: $(SETUP) ## start the production stack with docker compose: make up [SERVICE=trident-cpu]
	@$(BIN)/python deploy/keys.py
	$(if $(findstring collector,$(WATCHERS)),,TRIDENT_TRACES="$(TRIDENT_TRACES)" )docker compose --profile '*' up --build --detach --wait $(SERVICE) $(WATCHERS)

down: ## stop the production stack
	docker compose --profile '*' down

clean: ## remove exported artefacts, caches and reports; keep .venv
	rm -rf .cache reports site $(call quoted,$(REPOSITORY))/.trident $(call quoted,$(REPOSITORY))/*/[0-9]*
