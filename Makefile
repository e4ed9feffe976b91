# make demo   convert the embedded teacher and show the table (about 4 minutes on two cores)
# make test   the fast suite                make lint   ruff and pyright
# make ci     everything a change must pass make setup  only the environment
# make gpu    kernels tested and timed on the GPU here, result files with its name
#
# Each target makes its own environment in .venv, with the versions of constraints.txt. PYTHON=python3.12 chooses the
# interpreter, VENV=path another place. Where no CUDA device is, the CPU build of torch is taken, from the indexes that
# pip knows or from TORCH_INDEX (TORCH_INDEX= asks pip's own alone).

PYTHON ?= python3
VENV ?= .venv
CACHE := .cache
BIN := $(abspath $(VENV))/bin
PY := $(BIN)/python
PIP := $(PY) -m pip --disable-pip-version-check -q
TORCH_INDEX ?= https://download.pytorch.org/whl/cpu
TORCH := $(shell sed -n 's/^torch==//p' constraints.txt)
STAMP := $(VENV)/.installed
WORKERS ?= 2

# One thread per process: two workers on two cores are faster than two threads in each.
export OMP_NUM_THREADS ?= 1
export TOKENIZERS_PARALLELISM ?= false

.PHONY: setup demo test lint ci overlay slow kernels gpu wheel clean
.DEFAULT_GOAL := test

setup: $(STAMP)

# Made again only when what it holds has changed. torch goes first, alone and with little patience: an index that cannot be
# reached costs seconds. What torch needs comes with the rest.
$(STAMP): pyproject.toml constraints.txt
	test -x $(PY) || $(PYTHON) -m venv $(VENV)
	@if command -v nvidia-smi >/dev/null 2>&1 && nvidia-smi -L >/dev/null 2>&1; then \
		$(PIP) install 'torch==$(TORCH)'; \
	else \
		$(PIP) install --no-deps --retries 1 --timeout 10 $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX)) \
			'torch==$(TORCH)+cpu' 2>/dev/null \
		|| { echo "no CPU build of torch $(TORCH) found (TORCH_INDEX=$(TORCH_INDEX)): taking the default build"; \
			$(PIP) install 'torch==$(TORCH)'; }; \
	fi
	$(PIP) install -c constraints.txt -e '.[dev]'
	touch $@

demo: $(STAMP)
	rm -rf out/demo out/.demo.work
	OMP_NUM_THREADS=$${DEMO_THREADS:-2} $(BIN)/linearize convert --output-dir out/demo

test: $(STAMP)
	HF_HUB_OFFLINE=1 $(PY) -m pytest -q -n $(WORKERS) --dist worksteal

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --pythonpath $(PY)

# ------------------------------------------------------------------------------------------------------------- CI
# Tests go last: the last line is pytest's own summary.
ci: $(STAMP)
	$(MAKE) lint
	$(BIN)/linearize report --check
	$(MAKE) overlay
	$(MAKE) kernels
	$(MAKE) slow
	$(MAKE) wheel
	$(MAKE) test

# The oldest transformers and huggingface_hub that are promised to work, laid over the environment. httpx and httpcore
# are what that hub needs and today's does not.
OVERLAY := transformers==5.17.0 huggingface_hub==1.33.0 httpx==0.28.1 httpcore==1.0.9
OVERLAY_TESTS := tests/test_families.py tests/test_encoders.py tests/test_surgery.py

overlay: $(STAMP)
	@if [ "$$(cat $(CACHE)/overlay/.holds 2>/dev/null)" != '$(OVERLAY)' ]; then \
		rm -rf $(CACHE)/overlay \
		&& $(PIP) install --target $(CACHE)/overlay --no-deps $(OVERLAY) \
		&& echo '$(OVERLAY)' > $(CACHE)/overlay/.holds; \
	fi
	PYTHONPATH=$(abspath $(CACHE))/overlay $(PY) -c "import transformers, huggingface_hub as hub; \
		assert (transformers.__version__, hub.__version__) == ('5.17.0', '1.33.0')"
	PYTHONPATH=$(abspath $(CACHE))/overlay HF_HUB_OFFLINE=1 \
		$(PY) -m pytest -q -n $(WORKERS) --dist worksteal $(OVERLAY_TESTS)

# Exit code 5: none is marked slow, or the assets folder is absent.
slow: $(STAMP)
	HF_HUB_OFFLINE=1 $(PY) -m pytest -q -m slow -n $(WORKERS) --dist worksteal || [ $$? -eq 5 ]

# GPU kernels compiled without a GPU: none may spill registers or take too much shared memory. A first run takes minutes.
kernels: $(STAMP)
	TRITON_CACHE_DIR=$(abspath $(CACHE))/triton $(PY) benchmarks/aot.py --check

# Correctness in bfloat16 first; no time is taken of what is wrong.
gpu: $(STAMP)
	$(PY) -c "import torch; assert torch.cuda.is_available(), 'make gpu needs a CUDA device'"
	$(PY) -m pytest -q -m '' tests/test_triton.py tests/test_gated_triton.py tests/test_local2d_triton.py \
		tests/test_topk_triton.py tests/test_mapped_linear.py
	$(PY) benchmarks/ops.py --device cuda --dtype bfloat16 --flex --lengths 512,1024,2048,4096,8192,16384,32768,65536,131072

# The wheel in an environment without this checkout: linearize comes from the wheel, all else from .venv.
wheel: $(STAMP)
	rm -rf $(CACHE)/wheel $(CACHE)/bare $(CACHE)/bare-run
	$(PIP) wheel --no-deps -w $(CACHE)/wheel .
	$(PY) -m venv $(CACHE)/bare
	$(PY) -c "import sysconfig; print(sysconfig.get_path('purelib'))" \
		> "$$($(CACHE)/bare/bin/python -c "import sysconfig; print(sysconfig.get_path('purelib'))")/dependencies.pth"
	$(CACHE)/bare/bin/python -m pip -q --disable-pip-version-check install --no-deps $(CACHE)/wheel/*.whl
	mkdir -p $(CACHE)/bare-run
	cd $(CACHE)/bare-run && ../bare/bin/python -c "import linearize; assert '/bare/' in linearize.__file__, linearize"
	cd $(CACHE)/bare-run && ../bare/bin/linearize list recipes \
		&& ../bare/bin/linearize convert --max-steps 20 --output-dir out && test -s out/report.json

clean:
	rm -rf $(VENV) $(CACHE) dist build
