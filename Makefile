# Arapoet: GPT-2 on Arabic poetry. `make help` lists what there is.

CXX ?= g++
ARCH ?= native
CXXFLAGS ?= -O3
# No -ffast-math: NaN must stay NaN. Contraction to FMA is wanted, and stated.
FLAGS = -std=c++17 $(CXXFLAGS) -march=$(ARCH) -ffp-contract=fast -fno-math-errno -fno-trapping-math -fopenmp -Wall -Wextra -I.
HEADERS = $(wildcard *.h tokenizer/*.h data/*.h dev/*.h dev/*/*.h)
PROGRAMS = train_gpt2 sample_gpt2 prepare_data
BUILD ?= build

# What `make train` reads and where it writes; e.g. make train POEMS=poems.csv PRESET=char OUT=out/mine
POEMS ?= data/sample_poems.csv
PRESET ?= tiny
OUT ?= out
DATA ?= $(OUT)/data
TRAIN_FLAGS ?=

.PHONY: all help train finetune export plot test test-asan bench bench-gemm golden fuzz clean
all: $(PROGRAMS)

help:
	@echo "make train                     teach a small GPT-2 the built-in poems (a minute on 2 cores)"
	@echo "make train POEMS=poems.csv     the same on your poems: CSV with a column poem_text, or plain text"
	@echo "           PRESET=char         a larger model (tiny, char, gpt2, gpt2-medium, gpt2-large, gpt2-xl)"
	@echo "           OUT=out/mine        another folder   TRAIN_FLAGS='--max_steps 3000'   more flags"
	@echo "make plot                      draw the losses of OUT/log.csv to OUT/loss.png"
	@echo "make finetune HF=DIR POEMS=poems.csv OUT=out/mine"
	@echo "                               fine-tune a checkpoint in Hugging Face's form (GPT-2, AraGPT2) on your poems"
	@echo "make export HF=DIR OUT=out/mine"
	@echo "                               give the result back in that form, to OUT/hf"
	@echo "make test                      build and run all tests that need no GPU"
	@echo "make test-asan                 the same under AddressSanitizer and UBSan"
	@echo "make                           build ./train_gpt2 ./sample_gpt2 ./prepare_data (each has --help)"
	@echo "make bench                     time training steps and sampling, beside PyTorch and llm.c where they are"
	@echo "           ROWS=char RUNS=5    fewer rows, more runs   PYTHON=python3   LLMC=path/to/llm.c"
	@echo "make bench-gemm                time the matrix product beside oneDNN and OpenBLAS (SHAPES=124m, char or small)"
	@echo "make golden                    rewrite PyTorch's reference values (PYTHON= with torch and transformers)"
	@echo "make fuzz                      a minute of fuzzing for each reader of files (needs clang)"
	@echo "make clean                     remove the programs (never your data or models)"

train: $(PROGRAMS)
	./prepare_data $(POEMS) -o $(DATA)
	./train_gpt2 --data $(DATA) --preset $(PRESET) -o $(OUT) --overwrite $(TRAIN_FLAGS)

# HF: a folder as Hugging Face publishes it, with config.json, model.safetensors and the tokenizer's files
HF ?=
finetune: $(PROGRAMS) convert_gpt2 export_tokenizer
	@test -n "$(HF)" || { echo "make finetune: name the checkpoint's folder: make finetune HF=DIR POEMS=poems.csv" >&2; exit 2; }
	@mkdir -p $(OUT)
	./convert_gpt2 from-hf $(HF) $(OUT)/pretrained.bin
	./export_tokenizer $(HF) $(OUT)/pretrained_tokenizer.bin
	./prepare_data $(POEMS) -o $(DATA) --tokenizer $(OUT)/pretrained_tokenizer.bin
	./train_gpt2 -e $(OUT)/pretrained.bin --data $(DATA) -o $(OUT) --overwrite $(TRAIN_FLAGS)
	./sample_gpt2 -e $(OUT)/model.bin

export: convert_gpt2
	@test -n "$(HF)" || { echo "make export: name the folder whose tokenizer goes along: make export HF=DIR OUT=$(OUT)" >&2; exit 2; }
	./convert_gpt2 to-hf $(OUT)/model.bin $(OUT)/hf --tokenizer_dir $(HF)

plot:
	@dev/setup.sh plot
	@test -s $(OUT)/log.csv || { echo "make plot: $(OUT)/log.csv is missing; make train writes it" >&2; exit 1; }
	gnuplot -c dev/plot/loss.gp $(OUT)/log.csv $(OUT)/loss.png

train_gpt2: train_gpt2.cpp $(HEADERS)
	$(CXX) $(FLAGS) $< -o $@
sample_gpt2: sample_gpt2.cpp train_gpt2.cpp $(HEADERS)
	$(CXX) $(FLAGS) $< -o $@
prepare_data: data/prepare_data.cpp $(HEADERS)
	$(CXX) $(FLAGS) $< -o $@

convert_gpt2: dev/convert/convert_gpt2.cpp $(HEADERS)
	@dev/setup.sh convert
	$(CXX) $(FLAGS) $< -o $@
export_tokenizer: tokenizer/export_tokenizer.cpp $(HEADERS)
	@dev/setup.sh convert
	$(CXX) $(FLAGS) $< -o $@
tokenize: tokenizer/tokenize.cpp $(HEADERS)
	$(CXX) $(FLAGS) $< -o $@

# --- tests: one program from several files; test_gpt2.cpp has its main
TEST_SOURCES = test_gpt2.cpp $(wildcard data/test_*.cpp tokenizer/test_*.cpp dev/test_*.cpp dev/*/test_*.cpp)
TEST_OBJECTS = $(TEST_SOURCES:%.cpp=$(BUILD)/%.o)

test: $(PROGRAMS)
	@dev/setup.sh tests
	@$(MAKE) --no-print-directory -j$$(nproc) $(BUILD)/test_gpt2
	$(BUILD)/test_gpt2

test-asan:
	@$(MAKE) --no-print-directory test BUILD=build/asan PROGRAMS="$(PROGRAMS)" CXXFLAGS="-O1 -g -fsanitize=address,undefined -fno-sanitize-recover=all"

$(BUILD)/test_gpt2: $(TEST_OBJECTS)
	$(CXX) $(FLAGS) $^ -o $@
$(BUILD)/%.o: %.cpp train_gpt2.cpp sample_gpt2.cpp data/prepare_data.cpp $(wildcard dev/convert/*.cpp) $(HEADERS)
	@mkdir -p $(@D)
	$(CXX) $(FLAGS) -c $< -o $@

PYTHON ?= python3
# make bench ROWS=char RUNS=5: ROWS of 124m-4x64 124m-4x256 124m-1x1024 char, PARTS of steps sampling scaling, RUNS processes
# of STEPS steps each; PYTHON: one that has PyTorch; LLMC: a checkout of llm.c
ROWS ?=
PARTS ?= steps sampling scaling
RUNS ?=
STEPS ?=
LLMC ?=
bench: $(BUILD)/bench
	$(BUILD)/bench --rows "$(ROWS)" --parts "$(PARTS)" $(if $(RUNS),--runs $(RUNS)) $(if $(STEPS),--steps $(STEPS)) --python "$(PYTHON)" --llmc "$(LLMC)"
$(BUILD)/bench: dev/bench/bench.cpp train_gpt2.cpp $(HEADERS)
	@mkdir -p $(@D)
	$(CXX) $(FLAGS) $< -o $@

# Peers of the matrix product, where they are installed: sudo apt-get install libdnnl-dev libopenblas-openmp-dev
HAVE_DNNL = $(shell $(CXX) -std=c++17 -include dnnl.hpp -E -x c++ /dev/null >/dev/null 2>&1 && echo yes)
OPENBLAS_DIR = $(firstword $(wildcard /usr/lib/*/openblas-openmp))
OPENBLAS = -DHAVE_OPENBLAS -I$(subst /lib/,/include/,$(OPENBLAS_DIR)) -L$(OPENBLAS_DIR) -lopenblas -Wl,-rpath,$(OPENBLAS_DIR)
PEERS = $(if $(HAVE_DNNL),-DHAVE_DNNL -ldnnl) $(if $(OPENBLAS_DIR),$(OPENBLAS))
SHAPES ?=
THREADS ?= 0
bench-gemm: $(BUILD)/bench_gemm
	env -u OPENBLAS_CORETYPE -u OPENBLAS_L2_SIZE $(BUILD)/bench_gemm --shapes "$(SHAPES)" --threads $(THREADS) $(if $(RUNS),--runs $(RUNS))
$(BUILD)/bench_gemm: dev/bench/bench_gemm.cpp $(HEADERS)
	@mkdir -p $(@D)
	$(CXX) $(FLAGS) $< -o $@ $(PEERS)

golden:
	@$(PYTHON) -c 'import torch, transformers' 2>/dev/null || { echo "make golden: $(PYTHON) lacks torch or transformers; install them with: $(PYTHON) -m pip install -r dev/golden/requirements.txt" >&2; exit 1; }
	$(PYTHON) dev/golden/golden.py

FUZZ_SECONDS ?= 60
FUZZERS = $(wildcard data/fuzz_*.cpp tokenizer/fuzz_*.cpp dev/convert/fuzz_*.cpp)
fuzz:
	@dev/setup.sh fuzz
	@mkdir -p $(BUILD)
	@for f in $(FUZZERS); do b=$(BUILD)/$$(basename $$f .cpp); echo "== $$f"; \
	  clang++ -std=c++17 -g -O1 -I. -fsanitize=fuzzer,address,undefined -fno-sanitize-recover=all $$f -o $$b && \
	  $$b -max_total_time=$(FUZZ_SECONDS) -max_len=16384 -print_final_stats=1 -artifact_prefix=$(BUILD)/ >$$b.log 2>&1 || { tail -40 $$b.log; exit 1; }; \
	  grep -h number_of_executed $$b.log; done

clean:
	rm -rf $(PROGRAMS) convert_gpt2 export_tokenizer tokenize build
