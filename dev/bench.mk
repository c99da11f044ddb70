# Benchmarks, and PyTorch's reference values
.PHONY: bench bench-gemm golden

# For example: make bench ROWS=char RUNS=5
#   ROWS         some of 124m-4x64 124m-4x256 124m-1x1024 char
#   PARTS        some of steps optimizers sampling scaling
#   RUNS, STEPS  processes of each contestant, and steps of each process
#   PATIENCE     how many seconds each process may wait while the machine is slow
#   PYTHON       one that has PyTorch, or several
#   LLMC         a checkout of llm.c
ROWS ?=
PARTS ?= steps optimizers sampling scaling
RUNS ?=
STEPS ?=
PATIENCE ?=
LLMC ?=
bench: $(BUILD)/bench | $(call named,test test-layers test-asan test-portable)
	$< --rows "$(ROWS)" --parts "$(PARTS)" $(RUNS:%=--runs %) $(STEPS:%=--steps %) $(PATIENCE:%=--patience %) \
	  --python "$(PYTHON)" --llmc "$(LLMC)"
$(BUILD)/bench: $(BUILD)/dev/bench/bench.o $(GEMM:%=$(BUILD)/%)
	$(call link,$(BUILD))

# The matrix product's peers, if they are installed: sudo apt-get install libdnnl-dev libopenblas-openmp-dev
HAVE_DNNL = $(shell $(CXX) -std=c++17 -include dnnl.hpp -E -x c++ /dev/null >/dev/null 2>&1 && echo yes)
OPENBLAS_DIR = $(firstword $(wildcard /usr/lib/*/openblas-openmp))
OPENBLAS = -DHAVE_OPENBLAS -I$(subst /lib/,/include/,$(OPENBLAS_DIR))
OPENBLAS_LIB = -L$(OPENBLAS_DIR) -lopenblas -Wl,-rpath,$(OPENBLAS_DIR)
SHAPES ?=
THREADS ?= 0
COPIES ?= 1
bench-gemm: $(BUILD)/bench_gemm | $(call named,test test-layers test-asan test-portable bench)
	env -u OPENBLAS_CORETYPE -u OPENBLAS_L2_SIZE $< --shapes "$(SHAPES)" --threads $(THREADS) \
	  --copies $(COPIES) $(RUNS:%=--runs %)
$(BUILD)/dev/bench/bench_gemm.o: DEFINE = $(if $(HAVE_DNNL),-DHAVE_DNNL) $(if $(OPENBLAS_DIR),$(OPENBLAS))
$(BUILD)/bench_gemm: LDLIBS += $(if $(HAVE_DNNL),-ldnnl) $(if $(OPENBLAS_DIR),$(OPENBLAS_LIB))
$(BUILD)/bench_gemm: $(BUILD)/dev/bench/bench_gemm.o $(GEMM:%=$(BUILD)/%)
	$(call link,$(BUILD))

golden:
	@$(PYTHON) -c 'import torch, transformers' 2>/dev/null || { \
	  echo "make golden: $(PYTHON) lacks torch or transformers;" \
	  "install them with: $(PYTHON) -m pip install -r dev/golden/requirements.txt" >&2; exit 1; }
	$(PYTHON) dev/golden/golden.py
	$(PYTHON) dev/ladder/ladder_golden.py
