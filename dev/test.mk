# Tests. A test program's last line is "N passed, N failed[, N skipped]"; dev/run_tests.sh prints the sums.
.PHONY: format format-check test soak test-layers test-mpi test-asan test-emulator-asan test-emulator-tsan
.PHONY: fuzz check-fuzzers test-ranks test-slurm

# test_gpt2 tests what depends on the set of instructions: layers, products, vectors, random numbers.
# test_lib tests the rest of lib/; each other test_NAME.cpp is a separate program. test_cli starts
# the emulated programs.
LAYER_TESTS = test_gpt2.o lib/test_gemm.o lib/test_vec.o lib/test_rng.o
LIB_TESTS = $(filter-out $(LAYER_TESTS),$(patsubst %.cpp,%.o,$(wildcard lib/test_*.cpp)))
TOOL_TESTS = $(patsubst %.cpp,%,$(filter-out dev/test_main.cpp,$(wildcard data/test_*.cpp \
	tokenizer/test_*.cpp dev/test_*.cpp dev/*/test_*.cpp)))
TESTS = test_gpt2 test_lib $(notdir $(TOOL_TESTS))

# $(call tests,DIR): the test programs in DIR, a folder of objects
define tests
$1/test_gpt2: $(LAYER_TESTS:%=$1/%)
$1/test_lib: $(LIB_TESTS:%=$1/%)
$(foreach t,$(TOOL_TESTS),$(eval $1/$(notdir $t): $1/$t.o))
$1/test_data $1/test_poem_files $1/test_score: $1/data/json.o
$(TESTS:%=$1/%): $1/dev/test_main.o $(GEMM:%=$1/%)
	$$(call link,$1)
$(LAYER_TESTS:%=$1/%) $(LIB_TESTS:%=$1/%) $(TOOL_TESTS:%=$1/%.o) $1/dev/test_main.o: | need-tests
endef

# Tests that compute little: at -O1 they compile in half the time.
QUICK_TESTS = dev/test_main dev/test_cli dev/test_builds dev/convert/test_convert data/test_data \
	data/test_poem_files $(patsubst %,lib/test_%,checkpoint comm_tcp flags machine model_file params run_folder)
$(QUICK_TESTS:%=$(BUILD)/%.o): DEFINE = -O1

# Tests use all cores, and some have time limits. So these targets run their tests one after the other, in
# this order; meanwhile the objects of the next target are made.
$(eval $(call tests,$(BUILD)))
ifeq ($(NO_CUDA),)
$(eval $(call emulated,$(BUILD)))
CUDA_TESTS = $(EMULATED_TESTS:%=$(BUILD)/%)
CUDA_PROGRAMS = $(EMULATED_PROGRAMS:%=$(BUILD)/%)
else
SKIPPED_TESTS = $(EMULATED_TESTS:%="skip:%: $(NO_CUDA)")
endif
test: $(CUDA_TESTS) $(TESTS:%=$(BUILD)/%) $(CUDA_PROGRAMS) $(PROGRAMS) | $(call named,train ladder finetune)
	@dev/run_tests.sh $(TESTS:%=$(BUILD)/%) $(CUDA_TESTS) $(SKIPPED_TESTS)
test-layers: $(BUILD)/test_gpt2 | $(call named,test)
	@dev/run_tests.sh $<

# The CPU trainer over MPI, on this machine
$(BUILD)/train_gpt2_mpi: $(BUILD)/train_gpt2.o $(BUILD)/lib/comm_mpi.o $(BUILD)/lib/version.o \
	$(GEMM:%=$(BUILD)/%)
	$(call link,$(BUILD)) $(MPI_LIBS)
# It also starts ./train_gpt2, without MPI.
ifneq ($(and $(mpi),$(call named,test-mpi)),)
$(error make test-mpi: leave MPI=1 out)
endif
test-mpi: $(BUILD)/train_gpt2_mpi $(PROGRAMS) | $(call named,test test-layers)
	@dev/test_mpi.sh $<

# Ranks of the GPU trainer in the emulator, with all combinations of settings
test-ranks: $(BUILD)/test_gpu_ranks_fp32 $(BUILD)/test_gpu_ranks_bf16 | \
	$(call named,test test-layers test-mpi)
	@for p in $^; do $$p --no-skip || exit 1; done
# The scripts for Slurm, without Slurm
test-slurm: train_gpt2 prepare_data | $(call named,test test-layers test-mpi test-ranks)
	@dev/test_slurm.sh ./train_gpt2 ./prepare_data

# Under AddressSanitizer and UBSan. test_cli starts programs without sanitizers.
SANITIZE = -Og -g1 -fsanitize=address,undefined -fno-sanitize-recover=all
ASAN = $(BUILD)/asan
$(eval $(call folder,$(ASAN),$(call command,$(SANITIZE),$(MARCH))))
$(eval $(call tests,$(ASAN)))
test-asan: $(TESTS:%=$(ASAN)/%) $(PROGRAMS) | $(call named,test test-layers)
	@dev/run_tests.sh $(TESTS:%=$(ASAN)/%)

# The emulated CUDA code with the same sanitizers, and with ThreadSanitizer, which sees CUDA
# threads as threads
$(eval $(call emulated,$(ASAN)))
test-emulator-asan: $(EMULATED_TESTS:%=$(ASAN)/%) | $(call named,test test-layers test-asan test-portable)
	@dev/run_tests.sh $(EMULATED_TESTS:%=$(ASAN)/%)
TSAN = $(BUILD)/tsan
$(eval $(call folder,$(TSAN),$(call command,-O1 -g -fsanitize=thread,$(MARCH))))
$(eval $(call emulated,$(TSAN)))
test-emulator-tsan: $(EMULATED_TESTS:%=$(TSAN)/%) | \
	$(call named,test test-layers test-asan test-portable test-emulator-asan)
	@OMP_NUM_THREADS=1 dev/run_tests.sh $(EMULATED_TESTS:%=$(TSAN)/%)

# roofline.py is held to a step whose accesses to memory are counted: code that is compiled for
# ThreadSanitizer is linked with dev/emulator/accesses.cpp instead. Like gpu_check's rehearsal, the script is
# copied to the folder where its program is.
ifeq ($(NO_CUDA),)
$(TSAN)/$(EMULATOR)/cublaslt.o: DEFINE = -O2 -isystem $(CUDA_HOME)/include
$(BUILD)/count_step_emu: $(TSAN)/emulated/dev/bench/count_step_bf16.o $(TSAN)/$(EMULATOR)/cublaslt.o \
	$(BUILD)/libemu/$(EMULATOR)/accesses.o $(BUILD)/$(EMULATOR)/dynamic_smem.o $(BUILD)/lib/version.o \
	$(LIBEMU)
	$(call link,$(BUILD)) -ldl
$(BUILD)/count_step_emu: LDLIBS += -Wl,-rpath,$(abspath $(dir $(LIBEMU)))
$(BUILD)/test_roofline: dev/bench/test_roofline.py $(BUILD)/count_step_emu
	cp $< $@
ifeq ($(shell command -v $(PYTHON) 2>/dev/null),)
SKIPPED_TESTS += "skip:test_roofline: $(PYTHON) is missing"
else
CUDA_TESTS += $(BUILD)/test_roofline
test: $(BUILD)/test_roofline
endif
else
SKIPPED_TESTS += "skip:test_roofline: $(NO_CUDA)"
endif

# A minute of fuzzing for each reader of files. The fuzzer in dev/demo needs cpp-httplib: make fuzz-request.
FUZZ_SECONDS ?= 60
FUZZERS = $(filter-out dev/demo/%,$(wildcard data/fuzz_*.cpp tokenizer/fuzz_*.cpp dev/fuzz_*.cpp \
	dev/*/fuzz_*.cpp))
FUZZ = $(BUILD)/fuzz
FUZZ_COMMAND = clang++ -std=c++17 -O1 -g -I. -fsanitize=fuzzer,address,undefined -fno-sanitize-recover=all
$(eval $(call folder,$(FUZZ),$(FUZZ_COMMAND)))
$(FUZZERS:%.cpp=$(FUZZ)/%.o): | need-fuzz
$(FUZZ)/data/fuzz_csv: $(FUZZ)/data/json.o
$(FUZZERS:%.cpp=$(FUZZ)/%): %: %.o
	$(call link,$(FUZZ))
fuzz: $(FUZZERS:%.cpp=$(FUZZ)/%)
	@for f in $^; do echo "== $$f"; \
	  $$f -max_total_time=$(FUZZ_SECONDS) -max_len=16384 -print_final_stats=1 -artifact_prefix=$(FUZZ)/ \
	    >$$f.log 2>&1 || { tail -40 $$f.log; exit 1; }; \
	  grep -h number_of_executed $$f.log; done
# Whether the fuzzers compile, without clang
check-fuzzers: $(FUZZERS:%=check-%)
$(FUZZERS:%=check-%): check-%: | need-convert
	$(flags.$(BUILD)) -fsyntax-only $*

# Programs killed and broken while they write: SOAK_SECONDS of random cases, or SOAK_FLAGS=--all
SOAK_SECONDS ?= 60
SOAK_FLAGS ?= --seconds $(SOAK_SECONDS)
$(BUILD)/soak/faults.so: dev/soak/faults.cpp
	@mkdir -p $(@D)
	$(CXX) -std=c++17 -O1 -fPIC -shared -Wall -Wextra $< -o $@ -ldl
soak: $(BUILD)/soak/faults.so $(PROGRAMS) convert_gpt2 | need-python $(call named,test test-layers test-asan)
	$(PYTHON) dev/soak/soak.py --faults $< $(SOAK_FLAGS)

# The sources are formatted as .clang-format says; `make format` applies it. unicode_tables.h is generated.
SOURCES = $(filter-out tokenizer/unicode_tables.h,$(shell git ls-files '*.cpp' '*.h' '*.cu'))
format: | need-format
	clang-format -i $(SOURCES)
format-check: | need-format
	clang-format --dry-run -Werror $(SOURCES)
