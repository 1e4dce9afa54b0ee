# Two commands do everything on a fresh machine: `make demo` and `make test`.
PYTHON ?= python3
VENV   ?= .venv
# A CPU build where the machine has one; the package itself asks for torch>=2.6 only.
TORCH  ?= torch==2.13.0
PACKAGE := $(VENV)/.package
TOOLS   := $(VENV)/.tools
CONSUMERS := .consumers
PROGRAMS  := $(CONSUMERS)/.programs
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
	python benchmarks/quality.py --make run

# Programs that load adapters, mergekit and the converter of llama.cpp, which only comes with the
# source of llama-cpp-python; and olah, whose requirements are not theirs.
$(PROGRAMS): pyproject.toml
	$(PYTHON) -m venv $(CONSUMERS)/programs $(CONSUMERS)/olah
	$(CONSUMERS)/programs/bin/pip install --quiet $(TORCH)
	$(CONSUMERS)/programs/bin/pip install --quiet --editable '.[test,consumers]'
	$(CONSUMERS)/programs/bin/pip install --quiet --no-deps mergekit immutables
	$(CONSUMERS)/olah/bin/pip install --quiet olah
	rm -rf $(CONSUMERS)/llama-cpp-python && mkdir $(CONSUMERS)/llama-cpp-python
	$(CONSUMERS)/programs/bin/pip download --quiet --no-deps --no-binary llama-cpp-python \
		--dest $(CONSUMERS)/llama-cpp-python llama-cpp-python
	cd $(CONSUMERS)/llama-cpp-python && tar -xzf *.tar.gz --strip-components 1
	touch $@

consumers: $(PROGRAMS)
	$(CONSUMERS)/programs/bin/pytest -m '' -rs tests/oracle tests/consumers

clean:
	rm -rf $(VENV) $(CONSUMERS) demo build dist *.egg-info
