# Every target sets up what it needs: a virtual environment with PyTorch first and alone (other packages would pull a
# newer one), then the rest. LOCKED=1 installs the versions and hashes of requirements/lock.txt.
PYTHON ?= python3
VENV   ?= .venv
PY     := $(VENV)/bin/python
PIP    := $(VENV)/bin/pip install --quiet
TORCH  := torch==2.13.0
MODEL  ?= dense
SEED   ?= 0
RANKS  ?= 2
DEVICE ?= cpu
SEEDS  ?=
QUICK  ?=
LOCKED ?=
TALK_dense := runs/toy/final
TALK_moe   := runs/toy-moe/final
# Large blocks of memory are kept and not given back between steps: a step takes a twentieth less.
MALLOC := GLIBC_TUNABLES=glibc.malloc.hugetlb=1:glibc.malloc.mmap_threshold=4000000000:glibc.malloc.trim_threshold=8000000000:glibc.malloc.top_pad=67108864
LADDER := OMP_NUM_THREADS=1 $(MALLOC) $(VENV)/bin/torchrun --standalone --nproc-per-node $(RANKS) toy.py --device $(DEVICE)
SMOL   := OMP_NUM_THREADS=1 $(VENV)/bin/torchrun --standalone --nproc-per-node $(RANKS) -m smol.stages
# where a ladder goes, and what a quick look does: a fifth of the steps, fewer questions
TOY    := runs/toy$(if $(filter moe,$(MODEL)),-moe)$(if $(QUICK),-quick)
REAL   := runs/real$(if $(filter moe,$(MODEL)),-moe)
QUICKLY := $(if $(QUICK),--effort 0.2 --samples 50)
NUMBERS := $(if $(SEEDS),$(shell seq 0 $$(($(SEEDS) - 1))))
PYTEST := OMP_NUM_THREADS=1 $(PY) -m pytest -q -n 2 tests

.DEFAULT_GOAL := help
.PHONY: help env toy chat lesson serve real smol check test test-slow test-all faults mutants readme lock clean

help:            ## this list (times on two cores, without the first installation)
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*##/\t/' | expand -t 12

env: $(VENV)/core         ## 1 min    the environment alone, in .venv (LOCKED=1: the tested versions, with hashes)

toy: $(VENV)/core         ## 6-9 min  the whole recipe on a drawn world, graded stage by stage (MODEL=dense|moe SEED=0 RANKS=2 DEVICE=cpu; SEEDS=5: five of them, and their table; QUICK=1: a look, 80 s)
ifeq ($(SEEDS),)
	$(LADDER) --model $(MODEL) --seed $(SEED) --out $(TOY) $(QUICKLY)
else
	for seed in $(NUMBERS); do $(LADDER) --model $(MODEL) --seed $$seed --out $(TOY)-seed$$seed $(QUICKLY) || exit 1; done
	$(PY) -m tools.seeds $(NUMBERS:%=$(TOY)-seed%) --out runs/toy$(if $(QUICK),-quick)-seeds
endif

chat: $(VENV)/core        ## 5 s      talk to what was trained, about pictures (MODEL=dense|moe, or a directory)
	$(PY) -m talk.chat --model $(or $(TALK_$(MODEL)),$(MODEL))

lesson: $(VENV)/core      ## 5 s      five pages to follow by hand, whose numbers change live: runs/lessons/rows.html
	$(PY) -m lessons

real: $(VENV)/real        ## 9 min    the same ladder on published data: handwriting, emoji, typefaces, tables, photographs, easy-VQA
	$(PY) -m tools.real --out real
ifeq ($(SEEDS),)
	$(LADDER) --data real --samples 300 --out $(REAL) --model $(MODEL) --seed $(SEED)
else
	for seed in $(NUMBERS); do $(LADDER) --data real --samples 300 --out $(REAL)-seed$$seed --model $(MODEL) --seed $$seed || exit 1; done
	$(PY) -m tools.seeds $(NUMBERS:%=$(REAL)-seed%) --out runs/real-seeds
endif

smol: $(VENV)/smol        ## 35 min   a real language model learns to see: SmolLM2-135M from a wheel, our ViT, published data (goes on where it was)
	$(PY) -m tools.real --out real
	$(PY) -m smol.language
	$(SMOL) eyes --data real/train.jsonl --out runs/smol/eyes
	$(PY) -m smol.join
	$(SMOL) align --data real/train.jsonl --model runs/smol/start --out runs/smol/align
	$(SMOL) answers --data real/train.jsonl --model runs/smol/align --out runs/smol/answers
	$(PY) -m smol.measure

serve: $(VENV)/serve      ## 10 s     a page and an API for a model, on this machine: then open http://127.0.0.1:8000 (MODEL as for chat)
	$(PY) serve.py --model $(or $(TALK_$(MODEL)),$(MODEL))

check: $(VENV)/check      ## 1 s      lint, import order, line length, format
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .

test: $(VENV)/test        ## 3 min    the quick suite
	$(PYTEST) -m "not slow"

test-slow: $(VENV)/test   ## 3 min    the tests that take more than a few seconds each
	$(PYTEST) -m slow

test-all: $(VENV)/test    ## 6 min    every test
	$(PYTEST)

faults: $(VENV)/test     ## 40-70 min kills, full disks, damage, hostile input: the real scripts; goes on where it was
	$(PY) -m tests.campaign

mutants: $(VENV)/test    ## 1 h      one wrong thing at a time in thirteen files: does the quick suite notice?
	$(PY) -m tests.campaign --only mutants

readme: $(VENV)/core      ## 10 s     regenerate what README.md and RESULTS.md claim, from runs/ and the tree
	$(PY) -m tools.picture
	$(PY) -m tools.readme

lock: $(VENV)/test $(VENV)/check ## 10 s     solve requirements/ anew: requirements/lock.txt, versions and hashes
	$(PIP) uv
	$(PY) -m tools.lock
	$(PIP) --no-deps --require-hashes -r requirements/lock.txt
	$(PY) -m tools.lock --licences

clean:           ## 1 s      remove the environment and all runs
	rm -rf $(VENV) runs real

# ---------------------------------------------------------------------------------------------------------- environments

$(VENV)/torch:
	test -x $(PY) || $(PYTHON) -m venv $(VENV)
	$(PY) -c "import torch" 2>/dev/null || $(PIP) $(TORCH)
	touch $@

ifeq ($(LOCKED),)
$(VENV)/core: $(VENV)/torch requirements/core.txt
	$(PIP) -r requirements/core.txt
	touch $@

$(VENV)/check: requirements/check.txt
	test -x $(PY) || $(PYTHON) -m venv $(VENV)
	$(PIP) -r requirements/check.txt
	touch $@

$(VENV)/test: $(VENV)/core requirements/test.txt requirements/oracle.txt
	$(PIP) -r requirements/test.txt
	$(PIP) --no-deps -r requirements/oracle.txt
	touch $@
else
$(VENV)/lock: $(VENV)/torch requirements/lock.txt
	$(PIP) --no-deps --require-hashes -r requirements/lock.txt
	touch $@

$(VENV)/core $(VENV)/check $(VENV)/test: $(VENV)/lock
	touch $@
endif

$(VENV)/serve: $(VENV)/core requirements/serve.txt
	$(PIP) -r requirements/serve.txt
	touch $@

$(VENV)/smol: $(VENV)/real requirements/smol.txt
	$(PIP) --no-deps -r requirements/smol.txt
	touch $@

$(VENV)/real: $(VENV)/core requirements/real.txt
	$(PIP) --no-deps -r requirements/real.txt
	$(PIP) scikit-learn
	touch $@
