# make quickstart | test | test-slurm | lint | bench; each sets up .venv first where that has not been done.
# make gpu-check | gpu-wheels need no .venv.
# PYTHON       interpreter that .venv is made from, 3.11 or newer
# TORCH_INDEX  package index of PyTorch's CPU wheels, for machines where the plain torch wheel is the CUDA build
# TEST_ARGS, BENCH_ARGS, GPU_ARGS  passed on to pytest, to every benchmark, to gpu-check
# OFFLINE=1    make gpu-check without a network: the interpreter's own torch, triton and transformers, and the wheels
# WHEELS       folder of them; make gpu-wheels fills it where there is a network, for the same version of Python
PYTHON ?= python3
TORCH_INDEX ?=
TEST_ARGS ?=
BENCH_ARGS ?=
GPU_ARGS ?=
OFFLINE ?=
WHEELS ?= wheels

BIN := .venv/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
STAMP := .venv/.installed
BENCH_STAMP := .venv-bench/.installed
GPU_STAMP := .venv-gpu/.installed
GPU_NEEDS := benchmarks/gpu/requirements.txt
GPU_PEERS := benchmarks/gpu/peers.txt
export HF_HUB_OFFLINE := 1
export OMP_WAIT_POLICY := PASSIVE

.PHONY: setup quickstart test test-slurm lint bench gpu-check gpu-wheels clean

setup: $(STAMP)

# The stamp is written last, so an interrupted set-up is simply continued by the next one.
$(STAMP): setup.py
	@echo "[1/4] .venv from $$($(PYTHON) --version)"
	@$(PYTHON) -c 'import sys; sys.exit("or1_megatron needs Python 3.11 or newer; say which: make setup PYTHON=python3.11" if sys.version_info < (3, 11) else 0)'
	@$(PYTHON) -m venv .venv
	@echo "[2/4] torch 2.13.0, first: the build that is found now decides what the others bring"
	@$(PIP) install -qq $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) torch==2.13.0
	@echo "[3/4] or1_megatron with vLLM, Megatron-Core, Ray and the developer tools (1 to 5 minutes, 4 GB)"
	@$(PIP) install -qq -e '.[cpu,dev]'
	@echo "[4/4] removing torchvision, torchaudio, torchcodec: their wheels break against CPU torch"
	@$(PIP) uninstall -qq -y torchvision torchaudio torchcodec
	@touch $@
	@echo "done; try: make quickstart, or $(BIN)/or1 doctor"

quickstart: setup
	@$(BIN)/python launch/quickstart.py

# Two files at a time where that is safe; those that measure time or count processes need the machine for themselves.
test: setup
ifeq ($(TEST_ARGS),)
	$(BIN)/python -m pytest -n 2 --dist loadfile tests/unit tests/gpu tests/test_architecture.py --ignore tests/unit/reward
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder tests/e2e tests/parallel --ignore tests/parallel/test_kill.py
	$(BIN)/python -m pytest tests/parallel/test_kill.py tests/slurm tests/unit/reward
else
	$(BIN)/python -m pytest $(TEST_ARGS)
endif

# Everything about Slurm, on two that the tests start themselves: root and Debian's packages. Most of it waits for timers.
test-slurm: setup
	@if [ "$$(id -u)" = 0 ] && ! command -v slurmd >/dev/null && command -v apt-get >/dev/null; then \
	  apt-get update -q && apt-get install -q -y --no-install-recommends slurm-wlm munge iproute2 shellcheck; fi
	SLURM=full $(BIN)/python -m pytest -n 2 --dist loadfile tests/slurm $(TEST_ARGS)

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

# The peers live in an environment of their own on top of .venv: their requirements contradict each other and ours.
bench: $(BENCH_STAMP)
	@status=0; for file in $(filter-out benchmarks/harness.py,$(wildcard benchmarks/*.py)); do \
		.venv-bench/bin/python $$file $(BENCH_ARGS) || status=1; \
	done; exit $$status

$(BENCH_STAMP): $(STAMP)
	@echo "the peers that the benchmarks compare with, into .venv-bench"
	@$(BIN)/python -m venv .venv-bench
	@$(BIN)/python benchmarks/peers/install.py
	@touch $@

GPU_SOURCE := $(if $(OFFLINE),--isolated --no-index --find-links $(WHEELS))

# On one GPU, in at most eight minutes: tests marked gpu, then benchmarks; one table and gpu-check.json.
gpu-check: $(GPU_STAMP)
	@.venv-gpu/bin/python -m benchmarks.gpu.check $(GPU_ARGS)

# The packages of an interpreter that lives in an environment itself are no system packages. pip is one of them where the
# system cannot give an environment a pip of its own.
ADD_SITES := import sysconfig; print(*{f"import site; site.addsitedir({sysconfig.get_path(p)!r})" for p in ("purelib", "platlib")}, sep="\n")

# On top of the interpreter's own torch, which knows its GPU; what else it has already is taken as it is.
$(GPU_STAMP): $(GPU_NEEDS) $(GPU_PEERS)
	@$(PYTHON) -c 'import torch, triton, transformers' || { \
	  echo "gpu-check runs on the torch, triton and transformers of $(PYTHON): install them, or name another: make gpu-check PYTHON=..."; exit 2; }
	@echo "what the interpreter lacks of $(GPU_NEEDS), into .venv-gpu$(if $(OFFLINE), from $(WHEELS))"
	@$(PYTHON) -m venv --system-site-packages .venv-gpu >/dev/null || $(PYTHON) -m venv --system-site-packages --without-pip .venv-gpu
	@$(PYTHON) -c '$(ADD_SITES)' > "$$(.venv-gpu/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/base.pth"
	@.venv-gpu/bin/python -m pip --disable-pip-version-check install -qq --no-deps $(GPU_SOURCE) -r $(GPU_NEEDS) || { \
	  $(if $(OFFLINE),echo "a wheel is missing in $(WHEELS); where there is a network: make gpu-wheels WHEELS=$(WHEELS) PYTHON=python3.NN";) exit 2; }
	@rm -rf .venv-gpu/peers
	@for peer in $$(grep -v '^#' $(GPU_PEERS)); do \
	  .venv-gpu/bin/python -m pip --disable-pip-version-check install -qq --no-deps $(GPU_SOURCE) "$$peer" \
	    --target .venv-gpu/peers || echo "gpu-check goes without $$peer"; \
	done
	@touch $@

gpu-wheels:
	@$(PYTHON) -m pip --disable-pip-version-check download -q --no-deps --only-binary :all: -d $(WHEELS) \
	  -r $(GPU_NEEDS) -r $(GPU_PEERS)
	@ls $(WHEELS)

# Leaves .venv and runs/ alone.
clean:
	rm -rf build dist *.egg-info .pytest_cache .ruff_cache .hypothesis
	find . -path ./.venv -prune -o -name __pycache__ -type d -print | xargs -r rm -rf
