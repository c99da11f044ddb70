# Arapoet: GPT-2 on Arabic poetry. `make help` lists what there is.

CXX ?= g++
ARCH ?= native
CXXFLAGS ?= -O3
# PORTABLE=1 builds ./train_gpt2 and ./sample_gpt2 for any processor of this kind, see below.
PORTABLE ?=
portable = $(filter-out 0,$(PORTABLE))
ifneq ($(portable),)
override ARCH = $(BASE_ARCH)
endif
# No -ffast-math: NaN must stay NaN. Contraction to FMA is wanted, and stated.
FLAGS = $(BASE_FLAGS) $(or $(MARCH_$(ISA)),-march=$(ARCH))
# Tuned for some processors, g++ leaves a loop of one sum unfused: then an element's bits would hang on its neighbours'.
FUSE := $(shell f=--param=avoid-fma-max-bits=0; $(CXX) -Werror $$f -E -x c++ /dev/null >/dev/null 2>&1 && echo $$f)
BASE_FLAGS = -std=c++17 $(CXXFLAGS) -ffp-contract=fast $(FUSE) -fno-math-errno -fno-trapping-math -fopenmp -Wall -Wextra -I.
HEADERS = $(wildcard *.h tokenizer/*.h data/*.h dev/*.h dev/*/*.h)
PROGRAMS = train_gpt2 sample_gpt2 prepare_data
CUDA_HOME ?= /usr/local/cuda
BUILD ?= build

# What `make train` reads and where it writes; e.g. make train POEMS=poems.csv PRESET=char OUT=out/mine
POEMS ?= data/sample_poems.csv
PRESET ?= tiny
OUT ?= out
DATA ?= $(OUT)/data
TRAIN_FLAGS ?=
PREPARE_FLAGS ?=
PYTHON ?= python3

.PHONY: all help train finetune export plot ladder test test-portable test-asan test-emulator-asan test-emulator-tsan emulated-tests need-cuda need-nvcc need-python \
	gpu-check device-programs check-kernels roofline bench bench-gemm golden fuzz clean
all: $(PROGRAMS)

help:
	@echo "make train                     teach a small GPT-2 the built-in poems (a minute on 2 cores)"
	@echo "make train POEMS=poems.csv     the same on your poems: CSV with a column poem_text, or plain text"
	@echo "           PRESET=char         a larger model (tiny, char, gpt2, gpt2-medium, gpt2-large, gpt2-xl)"
	@echo "           OUT=out/mine        another folder   TRAIN_FLAGS='--max_steps 3000'   more flags"
	@echo "           PREPARE_FLAGS='--where poet_name=NAME'    more flags for ./prepare_data"
	@echo "make ladder POEMS=poems.csv    the way there, from a bigram table to GPT-2's block: losses, plots, poems (dev/ladder)"
	@echo "make plot                      draw the losses of OUT/log.csv to OUT/loss.png"
	@echo "make finetune HF=DIR POEMS=poems.csv OUT=out/mine"
	@echo "                               fine-tune a checkpoint in Hugging Face's form (GPT-2, AraGPT2) on your poems"
	@echo "make finetune FROM=out/model.bin POEMS=poems.csv OUT=out/mine"
	@echo "                               the same from a checkpoint trained here"
	@echo "make export HF=DIR OUT=out/mine"
	@echo "                               give the result back in that form, to OUT/hf"
	@echo "make test                      build and run all tests that need no GPU"
	@echo "make test-asan                 the same under AddressSanitizer and UBSan"
	@echo "make test-portable             the layers' tests for every set of instructions that make PORTABLE=1 knows"
	@echo "make test-emulator-asan        the emulated CUDA code under AddressSanitizer and UBSan"
	@echo "make test-emulator-tsan        the same under ThreadSanitizer, which finds races between CUDA threads"
	@echo "make train_gpt2cu              build the GPU trainer ./train_gpt2cu (PRECISION=BF16 or FP32; needs nvcc)"
	@echo "make gpu-check                 on a machine with a GPU: run the tests on it, and measure (writes dev/bench/gpu-NAME.md)"
	@echo "make check-kernels             what nvcc makes of the kernels: registers, spills, tensor-core instructions (no GPU)"
	@echo "make roofline                  recompute the traffic budget, dev/bench/ROOFLINE.md"
	@echo "make                           build ./train_gpt2 ./sample_gpt2 ./prepare_data (each has --help)"
	@echo "make bench                     time training steps and sampling, beside PyTorch and llm.c where they are"
	@echo "           ROWS=char RUNS=5    fewer rows, more runs   PYTHON=python3   LLMC=path/to/llm.c   PATIENCE=60"
	@echo "make bench-gemm                time the matrix product beside oneDNN and OpenBLAS (SHAPES=124m, char or small)"
	@echo "make golden                    rewrite PyTorch's reference values (PYTHON= with torch and transformers)"
	@echo "make fuzz                      a minute of fuzzing for each reader of files (needs clang)"
	@echo "make PORTABLE=1                the same programs for any processor of this kind; ARAPOET_ISA=avx2 etc. chooses a path"
	@echo "make clean                     remove the programs (never your data or models)"

train: $(PROGRAMS)
	./prepare_data $(POEMS) -o $(DATA) $(PREPARE_FLAGS)
	./train_gpt2 --data $(DATA) --preset $(PRESET) -o $(OUT) --overwrite $(TRAIN_FLAGS)

# HF: a folder as Hugging Face publishes it, with config.json, model.safetensors and the tokenizer's files;
# or FROM: a model file trained here, with tokenizer.bin beside it
HF ?=
FROM ?=
finetune: $(PROGRAMS) $(if $(FROM),,convert_gpt2 export_tokenizer)
	@test -n "$(HF)$(FROM)" || { echo "make finetune: name the checkpoint: make finetune HF=DIR POEMS=poems.csv, or FROM=out/model.bin" >&2; exit 2; }
	@mkdir -p $(OUT)
ifeq ($(FROM),)
	./convert_gpt2 from-hf $(HF) $(OUT)/pretrained.bin
	./export_tokenizer $(HF) $(OUT)/pretrained_tokenizer.bin
	./prepare_data $(POEMS) -o $(DATA) --tokenizer $(OUT)/pretrained_tokenizer.bin $(PREPARE_FLAGS)
	./train_gpt2 -e $(OUT)/pretrained.bin --data $(DATA) -o $(OUT) --overwrite $(TRAIN_FLAGS)
else
	./prepare_data $(POEMS) -o $(DATA) --tokenizer $(dir $(FROM))tokenizer.bin $(PREPARE_FLAGS)
	./train_gpt2 -e $(FROM) --data $(DATA) -o $(OUT) --overwrite $(TRAIN_FLAGS)
endif
	./sample_gpt2 -e $(OUT)/model.bin

# The program is built aside and copied here, since `make ladder` itself is the name of the climb.
LADDER ?= $(OUT)/ladder
LADDER_FLAGS ?=
ladder: prepare_data $(BUILD)/ladder
	@dev/setup.sh plot
	cp $(BUILD)/ladder ladder
	./prepare_data $(POEMS) -o $(DATA) $(PREPARE_FLAGS)
	./ladder --data $(DATA) --rung 0-7 -o $(LADDER) $(LADDER_FLAGS)
	gnuplot -c dev/ladder/ladder.gp $(LADDER)
	@echo "plots: $(LADDER)/bars.png, $(LADDER)/curves.png"
$(BUILD)/ladder: dev/ladder/ladder.cpp train_gpt2.cpp $(HEADERS)
	@mkdir -p $(@D)
	$(CXX) $(FLAGS) $< -o $@
score_poems: dev/ladder/score_poems.cpp data/prepare_data.cpp $(HEADERS)
	$(CXX) $(FLAGS) $< -o $@
export_run: dev/ladder/export_run.cpp train_gpt2.cpp $(HEADERS)
	$(CXX) $(FLAGS) $< -o $@

export: convert_gpt2
	@test -n "$(HF)" || { echo "make export: name the folder whose tokenizer goes along: make export HF=DIR OUT=$(OUT)" >&2; exit 2; }
	./convert_gpt2 to-hf $(OUT)/model.bin $(OUT)/hf --tokenizer_dir $(HF)

plot:
	@dev/setup.sh plot
	@test -s $(OUT)/log.csv || { echo "make plot: $(OUT)/log.csv is missing; make train writes it" >&2; exit 1; }
	gnuplot -c dev/plot/loss.gp $(OUT)/log.csv $(OUT)/loss.png

# There is one such file, so that the programs are built anew for another ARCH or PORTABLE.
BUILT_FOR = build/for.$(if $(portable),any,$(ARCH))
build/for.%:
	@mkdir -p $(@D); rm -f build/for.*; touch $@

ifeq ($(portable),)
train_gpt2 sample_gpt2: %: %.cpp train_gpt2.cpp $(HEADERS) $(BUILT_FOR)
	$(CXX) $(FLAGS) $< -o $@
else
train_gpt2 sample_gpt2: %: build/portable/% $(BUILT_FOR)
	cp $< $@
endif
prepare_data: data/prepare_data.cpp $(HEADERS) $(BUILT_FOR)
	$(CXX) $(FLAGS) $< -o $@

# A program several times over, once for each set of instructions, in one file that chooses when it starts
# (dev/portable.cpp). A variant is linked with its symbols made local, lest the linker take a template of another one.
ISAS = $(if $(filter x86-64,$(BASE_ARCH)),generic avx2 avx512 avx512bf16,generic)
BASE_ARCH = $(if $(filter x86_64,$(shell uname -m)),x86-64,armv8-a)
MARCH_generic = -march=$(BASE_ARCH)
MARCH_avx2 = -march=x86-64-v3
MARCH_avx512 = -march=x86-64-v4
MARCH_avx512bf16 = -march=x86-64-v4 -mavx512bf16
build/portable/%: build/portable/%.main.o $(foreach i,$(ISAS),build/portable/%.$i.o)
	$(CXX) $(BASE_FLAGS) $^ -o $@
build/portable/%.main.o: dev/portable.cpp $(HEADERS)
	@mkdir -p $(@D)
	$(CXX) $(BASE_FLAGS) -DPROGRAM='"$*"' -DVARIANTS="$(foreach i,$(ISAS),V($i))" -c $< -o $@
define VARIANT
build/portable/%.$1.o: %.cpp train_gpt2.cpp $(HEADERS)
	@mkdir -p $$(@D)
	$(CXX) $(BASE_FLAGS) $(MARCH_$1) -fno-gnu-unique -Dmain=run_$1 -c $$< -o $$@.all
	$(CXX) -r -nostdlib -Wl,--force-group-allocation $$@.all -o $$@.one
	objcopy --wildcard --keep-global-symbol='_Z*run_$1iPPc' $$@.one $$@
	@rm $$@.all $$@.one
endef
$(foreach i,$(ISAS),$(eval $(call VARIANT,$i)))

# --- the GPU trainer: for the GPUs of this machine, or without one for Ampere, Hopper, Blackwell and what comes after
PRECISION ?= BF16
NVCC ?= $(shell command -v nvcc || ls $(CUDA_HOME)/bin/nvcc 2>/dev/null)
GPUS = $(shell nvidia-smi --query-gpu=compute_cap --format=csv,noheader 2>/dev/null | sed -n 's/^\([0-9]*\)\.\([0-9]*\)$$/\1\2/p' | sort -u)
ARCHS = $(or $(GPUS),$(patsubst sm_%,%,$(filter sm_80 sm_90 sm_100,$(shell $(NVCC) --list-gpu-code))))
NVCC_FLAGS = -std=c++17 -O3 --threads 0 -I. -Xcompiler -fopenmp,-Wall,-Wextra $(if $(filter FP32,$(PRECISION)),-DPRECISION_FP32) \
	$(foreach a,$(ARCHS),-gencode arch=compute_$a,code=sm_$a) -gencode arch=compute_$(lastword $(ARCHS)),code=compute_$(lastword $(ARCHS))

train_gpt2cu: train_gpt2.cu $(HEADERS) $(BUILD)/precision.$(PRECISION) | need-nvcc
	$(NVCC) $(NVCC_FLAGS) $< -o $@ -lcublasLt
# There is one such file, so that the other precision is built anew.
$(BUILD)/precision.%:
	@case $* in BF16|FP32) ;; \
	  FP16) echo "make train_gpt2cu: PRECISION=FP16 is not supported, its range is too small for gradients without loss scaling; take BF16" >&2; exit 2;; \
	  *) echo "make train_gpt2cu: PRECISION=$* is unknown; known are BF16, FP32" >&2; exit 2;; esac
	@mkdir -p $(@D); rm -f $(BUILD)/precision.*; touch $@
need-python:
	@command -v $(PYTHON) >/dev/null || { echo "make: $(PYTHON) is missing; install it with: sudo apt-get install python3, or name one: PYTHON=FILE" >&2; exit 1; }
need-nvcc:
	@test -n "$(NVCC)" || { echo "make train_gpt2cu: nvcc is neither on the PATH nor in $(CUDA_HOME)/bin; install the CUDA Toolkit, 12 or later (https://developer.nvidia.com/cuda-downloads), or name it: make train_gpt2cu NVCC=FILE" >&2; exit 1; }

# What nvcc makes of the kernels, and the traffic budget on paper: neither needs a GPU.
check-kernels: need-nvcc need-python
	$(PYTHON) dev/check_kernels.py --nvcc $(NVCC)
	$(PYTHON) dev/check_kernels.py --nvcc $(NVCC) --fp32
roofline: need-python
	$(PYTHON) dev/bench/roofline.py

# On a machine with a GPU: the tests that the emulator runs, on the device; then speeds, to dev/bench/gpu-NAME.md
DEVICE_TESTS = $(foreach t,kernels attention model,$(BUILD)/device_test_gpu_$t_bf16 $(BUILD)/device_test_gpu_$t_fp32)
DEVICE_FLAGS = $(NVCC_FLAGS) -Xcompiler -march=$(ARCH) -diag-suppress 1675 $(if $(filter %fp32,$@),-DPRECISION_FP32)
gpu-check: need-nvcc
	@nvidia-smi >/dev/null 2>&1 || { echo "make gpu-check: nvidia-smi finds no GPU here; make test runs the same tests in the emulator" >&2; exit 1; }
	@dev/setup.sh tests
	@$(MAKE) --no-print-directory -j$$(nproc) PRECISION=BF16 device-programs
	dev/gpu_check.sh $(BUILD)
device-programs: $(DEVICE_TESTS) $(BUILD)/bench_gpu_bf16 $(BUILD)/bench_gpu_fp32
$(DEVICE_TESTS): $(BUILD)/device_test_gpu_%: train_gpt2.cu train_gpt2.cpp $(HEADERS) $(wildcard dev/test_gpu_*.cu) $(BUILD)/dev/test_main.o | need-nvcc
	$(NVCC) $(DEVICE_FLAGS) dev/test_gpu_$(firstword $(subst _, ,$*)).cu $(BUILD)/dev/test_main.o -o $@ -lcublasLt
$(BUILD)/bench_gpu_bf16 $(BUILD)/bench_gpu_fp32: dev/bench/bench_gpu.cu train_gpt2.cu $(HEADERS) | need-nvcc
	@mkdir -p $(@D)
	$(NVCC) $(DEVICE_FLAGS) $< -o $@ -lcublasLt

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
EMULATED_TESTS = test_emulator $(foreach t,kernels attention model,test_gpu_$t_bf16 test_gpu_$t_fp32)
EMULATED_TRAINERS = train_gpt2cu_emu train_gpt2cu_emu_fp32
TEST_PROGRAMS = $(BUILD)/test_gpt2 $(CUDA_TESTS)

ifneq ($(wildcard $(CUDA_HOME)/include/cuda_runtime.h),)
CUDA_TESTS = $(EMULATED_TESTS:%=$(BUILD)/%)
CUDA_PROGRAMS = $(EMULATED_TRAINERS:%=$(BUILD)/%)
else
NO_CUDA = the CUDA Toolkit's headers are not in $(CUDA_HOME)/include; install it (https://developer.nvidia.com/cuda-downloads) or name its folder: make CUDA_HOME=DIR
SKIPPED_TESTS = $(EMULATED_TESTS:%="skip:%: $(NO_CUDA)")
endif

test: $(PROGRAMS)
	@dev/setup.sh tests
	@$(MAKE) --no-print-directory -j$$(nproc) $(TEST_PROGRAMS) $(CUDA_PROGRAMS)
	@dev/run_tests.sh $(TEST_PROGRAMS) $(SKIPPED_TESTS)

test-asan:
	@$(MAKE) --no-print-directory test BUILD=build/asan CUDA_TESTS= CUDA_PROGRAMS= PROGRAMS="$(PROGRAMS)" CXXFLAGS="-O1 -g -fsanitize=address,undefined -fno-sanitize-recover=all"

# The layers' tests for each set of instructions that make PORTABLE=1 knows, and the choice among them
test-portable: prepare_data
	@dev/setup.sh tests
	@$(MAKE) --no-print-directory -j$$(nproc) build/portable/train_gpt2 $(ISAS:%=layers-%)
	@dev/test_portable.sh $(ISAS)
# AVX2 as tuned for a processor that would rather not fuse
layers-avx2: TUNE = CXXFLAGS="$(CXXFLAGS) -mtune=znver3"
layers-%:
	@$(MAKE) --no-print-directory BUILD=build/$* ISA=$* $(TUNE) TEST_SOURCES="test_gpt2.cpp dev/test_main.cpp" build/$*/test_gpt2

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
$(BUILD)/%.o: %.cpp train_gpt2.cpp sample_gpt2.cpp data/prepare_data.cpp $(wildcard dev/convert/*.cpp dev/ladder/*.cpp) $(HEADERS)
	@mkdir -p $(@D)
	$(CXX) $(FLAGS) -c $< -o $@

# --- dev/emulator: CUDA code compiled as C++, and the library in place of cudart and cuBLASLt. The library is the same,
# and never instrumented, in all builds; symbolic, lest it take a template from an instrumented program.
EMULATOR = dev/emulator
LIBEMU = build/libemu.so
LIBEMU_SOURCES = $(addprefix $(EMULATOR)/,fiber.cpp reports.cpp threads.cpp warp.cpp memory.cpp streams.cpp host_api.cpp cublaslt.cpp)
EMULATE = $(CXX) $(FLAGS) -g1 -fno-strict-aliasing -fno-extern-tls-init -Wno-unknown-pragmas -isystem $(CUDA_HOME)/include -I$(EMULATOR)/shadow \
	-x c++ -include $(EMULATOR)/emu.h
EMULATED_LINK = $(BUILD)/dev/test_main.o $(BUILD)/$(EMULATOR)/dynamic_smem.o $(LIBEMU) -Wl,-rpath,$(abspath build)

$(LIBEMU): $(LIBEMU_SOURCES:$(EMULATOR)/%.cpp=build/libemu/%.o)
	$(CXX) -shared -Wl,-soname,libemu.so,-Bsymbolic-functions $^ -o $@ -lpthread
build/libemu/%.o: $(EMULATOR)/%.cpp $(wildcard $(EMULATOR)/*.h) | need-cuda
	@mkdir -p $(@D)
	$(CXX) -std=c++17 -O2 -g1 -march=$(ARCH) -fPIC -ftls-model=initial-exec -Wall -Wextra -isystem $(CUDA_HOME)/include -c $< -o $@
$(BUILD)/%.emulated.o: %.cu $(wildcard $(EMULATOR)/*.h $(EMULATOR)/shadow/*) $(HEADERS) $(wildcard *.cu *.cpp) | need-cuda
	@mkdir -p $(@D)
	$(EMULATE) -c $< -o $@
# dev/test_gpu_NAME.cu in both precisions
EMULATED_DEPS = train_gpt2.cpp train_gpt2.cu $(wildcard $(EMULATOR)/*.h $(EMULATOR)/shadow/*) $(HEADERS) | need-cuda
$(BUILD)/dev/%_bf16.emulated.o: dev/%.cu $(EMULATED_DEPS)
	@mkdir -p $(@D)
	$(EMULATE) -c $< -o $@
$(BUILD)/dev/%_fp32.emulated.o: dev/%.cu $(EMULATED_DEPS)
	@mkdir -p $(@D)
	$(EMULATE) -DPRECISION_FP32 -c $< -o $@
$(BUILD)/test_gpu_%: $(BUILD)/dev/test_gpu_%.emulated.o $(BUILD)/dev/test_main.o $(BUILD)/$(EMULATOR)/dynamic_smem.o $(LIBEMU)
	$(CXX) $(FLAGS) $< $(EMULATED_LINK) -o $@
# The whole GPU trainer as a program of the CPU
$(BUILD)/train_gpt2cu_emu.o: train_gpt2.cu $(EMULATED_DEPS)
	@mkdir -p $(@D)
	$(EMULATE) -c $< -o $@
$(BUILD)/train_gpt2cu_emu_fp32.o: train_gpt2.cu $(EMULATED_DEPS)
	@mkdir -p $(@D)
	$(EMULATE) -DPRECISION_FP32 -c $< -o $@
$(BUILD)/train_gpt2cu_%: $(BUILD)/train_gpt2cu_%.o $(BUILD)/$(EMULATOR)/dynamic_smem.o $(LIBEMU)
	$(CXX) $(FLAGS) $(filter %.o,$^) $(LIBEMU) -Wl,-rpath,$(abspath build) -o $@
$(BUILD)/test_emulator: $(BUILD)/$(EMULATOR)/test_emulator.emulated.o $(BUILD)/dev/test_main.o $(BUILD)/$(EMULATOR)/dynamic_smem.o $(LIBEMU)
	$(CXX) $(FLAGS) $< $(EMULATED_LINK) -o $@

# make bench ROWS=char RUNS=5: ROWS of 124m-4x64 124m-4x256 124m-1x1024 char, PARTS of steps sampling scaling, RUNS processes
# of STEPS steps each, before which PATIENCE seconds may pass while the machine is slow;
# PYTHON: one that has PyTorch, or several; LLMC: a checkout of llm.c
ROWS ?=
PARTS ?= steps sampling scaling
RUNS ?=
STEPS ?=
PATIENCE ?=
LLMC ?=
bench: $(BUILD)/bench
	$(BUILD)/bench --rows "$(ROWS)" --parts "$(PARTS)" $(if $(RUNS),--runs $(RUNS)) $(if $(STEPS),--steps $(STEPS)) $(if $(PATIENCE),--patience $(PATIENCE)) --python "$(PYTHON)" --llmc "$(LLMC)"
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
COPIES ?= 1
bench-gemm: $(BUILD)/bench_gemm
	env -u OPENBLAS_CORETYPE -u OPENBLAS_L2_SIZE $(BUILD)/bench_gemm --shapes "$(SHAPES)" --threads $(THREADS) --copies $(COPIES) $(if $(RUNS),--runs $(RUNS))
$(BUILD)/bench_gemm: dev/bench/bench_gemm.cpp $(HEADERS)
	@mkdir -p $(@D)
	$(CXX) $(FLAGS) $< -o $@ $(PEERS)

golden:
	@$(PYTHON) -c 'import torch, transformers' 2>/dev/null || { echo "make golden: $(PYTHON) lacks torch or transformers; install them with: $(PYTHON) -m pip install -r dev/golden/requirements.txt" >&2; exit 1; }
	$(PYTHON) dev/golden/golden.py
	$(PYTHON) dev/ladder/ladder_golden.py

FUZZ_SECONDS ?= 60
FUZZERS = $(wildcard data/fuzz_*.cpp tokenizer/fuzz_*.cpp dev/fuzz_*.cpp dev/convert/fuzz_*.cpp)
fuzz:
	@dev/setup.sh fuzz
	@mkdir -p $(BUILD)
	@for f in $(FUZZERS); do b=$(BUILD)/$$(basename $$f .cpp); echo "== $$f"; \
	  clang++ -std=c++17 -g -O1 -I. -fsanitize=fuzzer,address,undefined -fno-sanitize-recover=all $$f -o $$b || exit 1; \
	  $$b -max_total_time=$(FUZZ_SECONDS) -max_len=16384 -print_final_stats=1 -artifact_prefix=$(BUILD)/ >$$b.log 2>&1 || { tail -40 $$b.log; exit 1; }; \
	  grep -h number_of_executed $$b.log; done

clean:
	rm -rf $(PROGRAMS) train_gpt2cu convert_gpt2 export_tokenizer tokenize ladder score_poems export_run build
