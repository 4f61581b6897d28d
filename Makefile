# make demo     from a policy and a reward to traces, a LoRA adapter and a comparison (embedded world, CPU)
# make test     the tests that need neither a GPU nor a network
# make bench    every method at equal FLOPs on the embedded world, with both rewards (some hours of one core)
# make check    linter, formatter and type checker, changing nothing
# make docs     the pages of docs/ as a site in outputs/site, with every link checked
# make world    make the embedded world's models again (recipes/tiny)
# make clean    remove the environment, outputs and caches
#
# Each first makes .venv with the versions of constraints.txt, if it is not there or they have changed.
#   PYTHON       the interpreter to make it with, 3.10 or newer:      make demo PYTHON=python3.12
#   TORCH_INDEX  an extra package index for torch. On Linux the default torch brings CUDA, some gigabytes;
#                without a GPU:  make demo TORCH_INDEX=https://download.pytorch.org/whl/cpu
#   WORKERS      processes that run the tests

PYTHON ?= python3
TORCH_INDEX ?=
WORKERS ?= 2

VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
SETUP_LOG := $(VENV)/.setup-seconds
STARTED := $(shell date +%s)

# Models and data of these targets lie in the repository.
export HF_HUB_OFFLINE := 1
export HF_DATASETS_OFFLINE := 1
export HF_HUB_DISABLE_TELEMETRY := 1
export TOKENIZERS_PARALLELISM := false

.PHONY: demo test bench check docs world clean venv

# seconds.setup of summary.json: what this very call of make spent on the environment, else 0.
demo: $(STAMP)
	NABLA_SETUP_SECONDS=$$(awk '$$1 == "$(STARTED)" { s = $$2 } END { print s + 0 }' $(SETUP_LOG)) \
	$(BIN)/accelerate launch --config_file recipes/accelerate/multi_cpu.yaml --num_cpu_threads_per_process 1 \
		recipes/distill.py --config recipes/tiny/distill.yaml

# One thread per worker: two workers with two threads each on two cores take twice as long.
test: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n $(WORKERS)

bench: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python recipes/research/compare.py --config recipes/tiny/compare.yaml
	OMP_NUM_THREADS=1 $(BIN)/python recipes/research/compare.py --config recipes/tiny/compare.yaml \
		--reward logratio:data/tiny/clean --min_p 0.02 --output_dir outputs/tiny-compare-logratio

check: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

docs: $(STAMP)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[docs]'
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

world: $(STAMP)
	$(BIN)/python recipes/tiny/make_world.py

venv: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { echo "nabla-trl needs Python 3.10 or \
	newer, and '$(PYTHON)' is not: run make with PYTHON=<path of a newer one>" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --constraint constraints.txt \
		$(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX)) --editable '.[dev,serve]'
	@echo "$(STARTED) $$(($$(date +%s) - $(STARTED)))" > $(SETUP_LOG)
	@touch $@

clean:
	rm -rf $(VENV) outputs dist build .pytest_cache .ruff_cache .mypy_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
