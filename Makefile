# Works with GNU make 3.81, the one that macOS has.
SHELL := /bin/bash
VENV := .venv
PY := $(VENV)/bin/python
STAMP := $(VENV)/.setup-complete
ROOMS := $(wildcard ivcore ivmlx ivtorch convert train agent bench)
PIP_INSTALL := $(PY) -m pip install --disable-pip-version-check -c constraints.txt

USABLE := import ensurepip, sys; sys.exit(sys.version_info < (3, 11))
PYTHON = $(shell for p in python3 python3.13 python3.12 python3.11 python3.14; do \
	"$$p" -c '$(USABLE)' 2>/dev/null && { echo "$$p"; break; }; done)

# MLX's Linux wheel brings the reference BLAS: a float32 matrix product is some thirty times slower than with OpenBLAS.
# PyTorch brings its own, and with OpenBLAS in its place has two sets of threads that wait for each other: what runs on
# PyTorch alone gets none. Looked up when a recipe runs, since `setup` may have installed it a moment before.
OPENBLAS = $(shell [ "$$(uname)" = Linux ] && { \
	ls "/usr/lib/$$(uname -m)-linux-gnu/openblas-pthread/libopenblas.so.0" 2>/dev/null; \
	PATH="$$PATH:/sbin:/usr/sbin" ldconfig -p 2>/dev/null | sed -n 's/.*libopenblasp\{0,1\}\.so\.0 .*=> //p'; } | head -n 1)
RUN = $(if $(OPENBLAS),LD_PRELOAD="$(OPENBLAS)$${LD_PRELOAD:+:$$LD_PRELOAD}") $(PY)

APT := DEBIAN_FRONTEND=noninteractive apt-get -o Acquire::http::Timeout=30 -o Acquire::https::Timeout=30

.DEFAULT_GOAL := help
.PHONY: help setup openblas demo test lint bench tiny-base tiny-adapters tiny clean

help: ## list the targets
	@sed -n 's/^\([a-z-]*\):[^#]*## /  make \1	/p' Makefile | expand -t 22

setup: $(STAMP) ## make .venv with every direct dependency at its pinned version

demo: setup ## iv3-tiny answers three questions about a clip, on both backends, and finds an event in a long film
	@$(RUN) -m agent.demo

# Two processes of one thread each, which take test files in turns: with more threads they get in each other's way.
test: setup ## run the tests
	OMP_NUM_THREADS=1 $(RUN) -m pytest -n 2 --dist loadfile

lint: setup ## ruff (rules and format) and mypy
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy $(ROOMS)

bench: setup ## measure video sampling, memory, conversion and training
	$(RUN) bench/video_sampling.py
	$(RUN) bench/memory.py
	$(RUN) bench/convert.py --layers 4
	$(RUN) bench/train.py

tiny-base: setup ## train iv3-tiny's base from nothing, into build/tiny-base
	$(PY) -m train.tiny.base --out build/tiny-base

tiny-adapters: setup ## train LoRAs on that base (sft, rl, distill; three seeds), into build/tiny-adapters
	$(PY) -m train.tiny.adapters --base build/tiny-base --out build/tiny-adapters

tiny: setup ## make iv3-tiny of that base (M2LA, cpt, sft, rl, distill of three seeds; then acting), into build/tiny
	$(PY) -m train.tiny.pipeline --base build/tiny-base --out build/tiny

clean: ## remove .venv, caches and build outputs
	rm -rf $(VENV) .hypothesis .mypy_cache .pytest_cache .ruff_cache build dist bench/out
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# torch goes first and alone, so that nothing looser can choose another build of it.
$(STAMP): pyproject.toml constraints.txt
	@$(MAKE) --no-print-directory openblas
	@$(PY) -c '$(USABLE)' 2>/dev/null || { python="$(PYTHON)"; \
	if [ -z "$$python" ]; then \
	echo "No Python 3.11 or newer with the venv module was found: install one (on Debian also python3-venv)," \
	"or name it, as in: make setup PYTHON=/path/to/python3.12" >&2; exit 1; fi; \
	echo "making $(VENV) with $$python"; "$$python" -m venv --clear $(VENV); }
	$(PIP_INSTALL) torch hatchling
	$(PIP_INSTALL) --no-build-isolation -e '.[dev]'
	@touch $@

openblas:
ifeq ($(shell uname),Linux)
	@[ -n "$(OPENBLAS)" ] || { [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null \
	&& echo "installing OpenBLAS (libopenblas0-pthread)" \
	&& { $(APT) update; $(APT) install -y --no-install-recommends libopenblas0-pthread; } >/dev/null 2>&1; } \
	|| echo "Going on without OpenBLAS: MLX on the CPU will be slow until libopenblas0-pthread is installed."
endif
