# Every target sets up what it needs: a virtual environment with PyTorch first and alone (other packages would pull a
# newer one), then the rest.
PYTHON ?= python3
VENV   ?= .venv
PY     := $(VENV)/bin/python
MODEL  ?= dense
SEED   ?= 0
RANKS  ?= 2
LADDER := OMP_NUM_THREADS=1 $(VENV)/bin/torchrun --standalone --nproc-per-node $(RANKS) toy.py

.DEFAULT_GOAL := help
.PHONY: help toy real test readme clean

help:            ## this list
	@grep -E '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*##/\t/' | expand -t 12

toy: $(VENV)/core         ## the whole recipe on a drawn world, graded stage by stage (MODEL=dense|moe SEED=0 RANKS=2)
	$(LADDER) --model $(MODEL) --seed $(SEED) --out runs/toy$(if $(filter moe,$(MODEL)),-moe)

real: $(VENV)/real        ## the same ladder on published data: easy-VQA, OpenMoji, handwritten digits
	$(PY) -m tools.real --out real
	$(LADDER) --data real --out runs/real --model $(MODEL) --seed $(SEED)

test: $(VENV)/test        ## the quick suite
	OMP_NUM_THREADS=1 $(PY) -m pytest -q -n 2 tests

readme: $(VENV)/core      ## regenerate the README's measured parts from runs/ and the tree
	$(PY) -m tools.readme

clean:           ## remove the environment and all runs
	rm -rf $(VENV) runs real

$(VENV)/core: requirements/core.txt
	test -x $(PY) || $(PYTHON) -m venv $(VENV)
	$(PY) -c "import torch" 2>/dev/null || $(VENV)/bin/pip install --quiet torch==2.13.0
	$(VENV)/bin/pip install --quiet -r requirements/core.txt
	touch $@

$(VENV)/test: $(VENV)/core requirements/test.txt requirements/oracle.txt
	$(VENV)/bin/pip install --quiet -r requirements/test.txt
	$(VENV)/bin/pip install --quiet --no-deps -r requirements/oracle.txt
	touch $@

$(VENV)/real: $(VENV)/core requirements/real.txt
	$(VENV)/bin/pip install --quiet --no-deps -r requirements/real.txt
	$(VENV)/bin/pip install --quiet scikit-learn
	touch $@
