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

.PHONY: all help train finetune export plot test test-asan test-emulator-asan test-emulator-tsan emulated-tests need-cuda bench golden fuzz clean
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
	@echo "make test-emulator-asan        the emulated CUDA code under AddressSanitizer and UBSan"
	@echo "make test-emulator-tsan        the same under ThreadSanitizer, which finds races between CUDA threads"
	@echo "make                           build ./train_gpt2 ./sample_gpt2 ./prepare_data (each has --help)"
	@echo "make bench                     time the matrix product and training steps"
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

# --- tests: test_gpt2 from several files, and programs of CUDA code that dev/emulator runs on the CPU
TEST_SOURCES = test_gpt2.cpp $(wildcard data/test_*.cpp tokenizer/test_*.cpp dev/test_*.cpp dev/*/test_*.cpp)
TEST_OBJECTS = $(TEST_SOURCES:%.cpp=$(BUILD)/%.o)
EMULATED_TESTS = test_emulator
TEST_PROGRAMS = $(BUILD)/test_gpt2 $(CUDA_TESTS)

CUDA_HOME ?= /usr/local/cuda
ifneq ($(wildcard $(CUDA_HOME)/include/cuda_runtime.h),)
CUDA_TESTS = $(EMULATED_TESTS:%=$(BUILD)/%)
else
NO_CUDA = the CUDA Toolkit's headers are not in $(CUDA_HOME)/include; install it (https://developer.nvidia.com/cuda-downloads) or name its folder: make CUDA_HOME=DIR
SKIPPED_TESTS = $(EMULATED_TESTS:%="skip:%: $(NO_CUDA)")
endif

test: $(PROGRAMS)
	@dev/setup.sh tests
	@$(MAKE) --no-print-directory -j$$(nproc) $(TEST_PROGRAMS)
	@dev/run_tests.sh $(TEST_PROGRAMS) $(SKIPPED_TESTS)

test-asan:
	@$(MAKE) --no-print-directory test BUILD=build/asan CUDA_TESTS= PROGRAMS="$(PROGRAMS)" CXXFLAGS="-O1 -g -fsanitize=address,undefined -fno-sanitize-recover=all"

# The same CUDA code under AddressSanitizer and UBSan, and under ThreadSanitizer with a TSan fiber for each CUDA thread
test-emulator-asan: need-cuda
	@dev/setup.sh tests
	@$(MAKE) --no-print-directory emulated-tests BUILD=build/emulator-asan CXXFLAGS="-O1 -g -fsanitize=address,undefined -fno-sanitize-recover=all"
test-emulator-tsan: need-cuda
	@dev/setup.sh tests
	@OMP_NUM_THREADS=1 $(MAKE) --no-print-directory emulated-tests BUILD=build/emulator-tsan CXXFLAGS="-O1 -g -fsanitize=thread"
emulated-tests:
	@$(MAKE) --no-print-directory -j$$(nproc) $(CUDA_TESTS)
	@dev/run_tests.sh $(CUDA_TESTS)
need-cuda:
	@test -z "$(NO_CUDA)" || { echo "make: $(NO_CUDA)" >&2; exit 1; }

$(BUILD)/test_gpt2: $(TEST_OBJECTS)
	$(CXX) $(FLAGS) $^ -o $@
$(BUILD)/%.o: %.cpp train_gpt2.cpp sample_gpt2.cpp data/prepare_data.cpp $(wildcard dev/convert/*.cpp) $(HEADERS)
	@mkdir -p $(@D)
	$(CXX) $(FLAGS) -c $< -o $@

# --- dev/emulator: CUDA code compiled as C++, and the library in place of cudart and cuBLASLt. The library is the same,
# and never instrumented, in all builds; symbolic, lest it take a template from an instrumented program.
EMULATOR = dev/emulator
LIBEMU = build/libemu.so
LIBEMU_SOURCES = $(addprefix $(EMULATOR)/,fiber.cpp reports.cpp threads.cpp warp.cpp memory.cpp streams.cpp host_api.cpp cublaslt.cpp)
EMULATED_FLAGS = $(FLAGS) -g1 -isystem $(CUDA_HOME)/include -I$(EMULATOR)/shadow
EMULATED_LINK = $(BUILD)/dev/test_main.o $(BUILD)/$(EMULATOR)/dynamic_smem.o $(LIBEMU) -Wl,-rpath,$(abspath build)

$(LIBEMU): $(LIBEMU_SOURCES:$(EMULATOR)/%.cpp=build/libemu/%.o)
	$(CXX) -shared -Wl,-soname,libemu.so,-Bsymbolic-functions $^ -o $@ -lpthread
build/libemu/%.o: $(EMULATOR)/%.cpp $(wildcard $(EMULATOR)/*.h) | need-cuda
	@mkdir -p $(@D)
	$(CXX) -std=c++17 -O2 -g1 -march=$(ARCH) -fPIC -ftls-model=initial-exec -Wall -Wextra -isystem $(CUDA_HOME)/include -c $< -o $@
$(BUILD)/%.emulated.o: %.cu $(wildcard $(EMULATOR)/*.h $(EMULATOR)/shadow/*) $(HEADERS) $(wildcard *.cu *.cpp) | need-cuda
	@mkdir -p $(@D)
	$(CXX) $(EMULATED_FLAGS) -x c++ -include $(EMULATOR)/emu.h -fno-extern-tls-init -Wno-unknown-pragmas -c $< -o $@
$(BUILD)/test_emulator: $(BUILD)/$(EMULATOR)/test_emulator.emulated.o $(BUILD)/dev/test_main.o $(BUILD)/$(EMULATOR)/dynamic_smem.o $(LIBEMU)
	$(CXX) $(FLAGS) $< $(EMULATED_LINK) -o $@

bench: $(BUILD)/bench
	$(BUILD)/bench
$(BUILD)/bench: dev/bench/bench.cpp train_gpt2.cpp $(HEADERS)
	@mkdir -p $(@D)
	$(CXX) $(FLAGS) $< -o $@

PYTHON ?= python3
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
