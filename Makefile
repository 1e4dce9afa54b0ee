# Two commands do everything on a fresh machine: `make demo` and `make test`.
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
# A CPU build where the machine has one; the package itself asks for torch>=2.6 only.
TORCH  ?= torch==2.13.0
STAMP  := $(VENV)/.installed

.PHONY: demo test check docs bench quality consumers fixtures clean

$(STAMP): pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --upgrade pip
	$(BIN)/pip install --quiet $(TORCH)
	$(BIN)/pip install --quiet --editable '.[test,check]'
	touch $@

# The two emblem commands on adapters truly trained (fixtures/testbed), into demo/.
demo: $(STAMP)
	rm -rf demo && mkdir demo
	cp fixtures/testbed/adapters/sh3_rev/adapter_model.safetensors demo/a.safetensors
	cp fixtures/testbed/adapters/sort_inter/adapter_model.safetensors demo/b.safetensors
	cd demo && ../$(BIN)/loramerge cluster a.safetensors b.safetensors -k 16
	cd demo/a+b-k16 && ../../$(BIN)/loramerge squeeze --rank 8 -o ../a+b-k16-r8

test: $(STAMP) check
	$(BIN)/pytest -n auto

check: $(STAMP)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/python docs/make.py --check

docs: $(STAMP)
	$(BIN)/python docs/make.py

fixtures: $(STAMP)
	$(BIN)/python fixtures/make.py

bench: $(STAMP)
	$(BIN)/python benchmarks/speed.py

quality: $(STAMP)
	$(BIN)/python benchmarks/quality.py

consumers: $(STAMP)
	$(BIN)/pytest tests/consumers

clean:
	rm -rf $(VENV) demo build dist *.egg-info
