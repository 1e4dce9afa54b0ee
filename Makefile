# Two commands do everything on a fresh machine: `make demo` and `make test`.
PYTHON ?= python3
VENV   ?= .venv
# A CPU build where the machine has one; the package itself asks for torch>=2.6 only.
TORCH  ?= torch==2.13.0
PACKAGE := $(VENV)/.package
TOOLS   := $(VENV)/.tools
export PATH := $(abspath $(VENV)/bin):$(PATH)

.PHONY: demo test check docs bench quality consumers fixtures clean

$(PACKAGE): pyproject.toml
	$(PYTHON) -m venv $(VENV)
	pip install --quiet $(TORCH)
	pip install --quiet --editable .
	touch $@

$(TOOLS): $(PACKAGE)
	pip install --quiet --editable '.[test,check]'
	touch $@

# The two emblem commands on adapters truly trained (fixtures/testbed), in demo/.
demo: $(PACKAGE)
	@rm -rf demo && mkdir demo
	@cp fixtures/testbed/adapters/sh3_rev/adapter_model.safetensors demo/a.safetensors
	@cp fixtures/testbed/adapters/sort_inter/adapter_model.safetensors demo/b.safetensors
	cd demo && loramerge cluster a.safetensors b.safetensors -k 16
	cd demo/a+b-k16 && loramerge squeeze --rank 8

test: check
	pytest -n auto

check: $(TOOLS)
	ruff format --check .
	ruff check .
	mypy
	lint-imports
	python docs/make.py --check

docs: $(PACKAGE)
	python docs/make.py

fixtures: $(TOOLS)
	python fixtures/make.py

bench: $(TOOLS)
	python benchmarks/speed.py

quality: $(TOOLS)
	python benchmarks/quality.py

# Peers whose requirements are not ours lie in a folder of their own, seen by these tests alone.
consumers: $(TOOLS)
	pip install --quiet --upgrade --no-deps --target .consumers mergekit immutables
	test -x .consumers/olah/bin/olah-cli || $(PYTHON) -m venv .consumers/olah
	.consumers/olah/bin/pip install --quiet olah
	PYTHONPATH=.consumers pytest tests/oracle tests/consumers

clean:
	rm -rf $(VENV) demo build dist *.egg-info
