# The check of the GPU trainer on a device: dev/gpu_check.py and the programs it runs, here (make gpu-check),
# or packed for another machine (make gpu-pack).
.PHONY: gpu-check gpu-pack device-programs need-doctest
# The programs that the check runs. What matters most is made first.
CHECK_GPU = $(foreach p,bf16 fp32,bench_gpu_$p train_gpt2cu_$p \
	test_gpu_kernels_$p test_gpu_attention_$p test_gpu_model_$p)
CHECK_CPU = train_gpt2 prepare_data sample_gpt2
# A pack also has the program that writes poems with what was trained.
PACK_GPU = $(CHECK_GPU) sample_gpt2cu_bf16
# In a pack doctest's header is in the folder itself, and nothing is installed.
need-doctest: | $(if $(wildcard doctest/doctest.h),,need-tests)

# $(call check_programs,DIR,PROCESSOR): the rules of these programs in DIR. They do without NCCL, so that they
# start where it is missing.
check_nvcc = $(filter-out -DUSE_NCCL,$(nvcc)) -diag-suppress 1675 -Xcompiler -march=$1
define check_programs
$(call folder,$1,$(call command,$(CXXFLAGS),-march=$2))
flags.$1/gpu = $(call check_nvcc,$2)
$1/gpu/flags: | need-archs
$1/gpu/%: DEFINE = $$(if $$(filter %_fp32.o,$$@),-DPRECISION_FP32)
$(call check_object,$1,sample_gpt2cu_bf16,sample_gpt2.cu)
$(foreach p,bf16 fp32,$(call check_object,$1,train_gpt2cu_$p,train_gpt2.cu)
$(call check_object,$1,bench_gpu_$p,dev/bench/bench_gpu.cu)
$(foreach t,kernels attention model,$(call check_object,$1,test_gpu_$t_$p,dev/test_gpu_$t.cu)
))
$(PACK_GPU:%=$1/bin/%): $1/bin/%: $1/gpu/%.o $1/lib/version.o
	@mkdir -p $$(@D)
	$$(flags.$1/gpu) $$(filter %.o,$$^) -o $$@ $$(CHECK_LIBS)
$(filter $1/bin/test_%,$(CHECK_GPU:%=$1/bin/%)): $1/dev/test_main.o $(GEMM:%=$1/%)
$1/dev/test_main.o: | need-doctest
$1/bin/train_gpt2: $1/train_gpt2.o $(GEMM:%=$1/%)
$1/bin/sample_gpt2: $1/sample_gpt2.o $1/train_gpt2.o $(GEMM:%=$1/%)
$1/bin/prepare_data: $1/data/prepare_data.o $1/data/json.o
$(CHECK_CPU:%=$1/bin/%): $1/lib/version.o
	@mkdir -p $$(@D)
	$$(flags.$1) $$(filter %.o,$$^) -o $$@ $$(LDLIBS) $$(CHECK_CPU_LIBS)
endef
# $(call check_object,DIR,NAME,SOURCE)
define check_object
$1/gpu/$2.o: $3 $1/gpu/flags | need-doctest
	@mkdir -p $$(@D)
	$$(flags.$1/gpu) $$(DEFINE) -MMD -MP -c $$< -o $$@

endef

# For this machine
DEVICE = $(BUILD)/device
$(eval $(call check_programs,$(DEVICE),$(ARCH)))
$(DEVICE)/bin/%: CHECK_LIBS = -lcublasLt $(patsubst %,-Xlinker -rpath -Xlinker %,$(call library,cublasLt))
device-programs: $(CHECK_GPU:%=$(DEVICE)/bin/%) $(CHECK_CPU:%=$(DEVICE)/bin/%)
# Runs everything on this machine's GPU, at most ten minutes; the report is in OUT/gpu-check.md.
GPU_CHECK_FLAGS ?=
gpu-check: device-programs | need-gpu need-python
	$(PYTHON) dev/gpu_check.py --bin $(DEVICE)/bin --out $(call quote,$(OUT)/gpu-check) $(GPU_CHECK_FLAGS)

# For machines with the GPUs ARCHS="80 90", an x86-64 processor with AVX2 and glibc, where only the GPU's
# driver and cuBLASLt need to be installed: the libraries of g++ are linked into the programs.
PACK = $(BUILD)/pack
PACK_NAME = arapoet-gpu-check
PACK_STATIC = $(abspath $(PACK))/static
$(eval $(call check_programs,$(PACK),x86-64-v3))
$(PACK)/bin/%: CHECK_LIBS = -L$(PACK_STATIC) -Xcompiler -static-libstdc++ -Xlinker --gc-sections \
	-lcublasLt -ldl
$(PACK)/bin/%: CHECK_CPU_LIBS = -L$(PACK_STATIC) -static-libstdc++ -Wl,--gc-sections -ldl
PACK_PROGRAMS = $(PACK_GPU:%=$(PACK)/bin/%) $(CHECK_CPU:%=$(PACK)/bin/%)
$(PACK_PROGRAMS): | $(PACK)/static/libgomp.a
$(PACK)/static/libgomp.a:
	@mkdir -p $(@D)
	ln -sf "$$($(HOST_CXX) -print-file-name=libgomp.a)" $@
# The sources go along, to build the programs again where these do not start.
PACK_SOURCES = $(wildcard $(filter-out .ci/% %/golden.bin,$(shell git ls-files -c)))
gpu-pack: build/gpu-pack.tar.gz
build/gpu-pack.tar.gz: $(PACK_PROGRAMS) dev/gpu_check.py FORCE
	@mkdir -p $(@D); rm -rf $(PACK)/$(PACK_NAME)
	mkdir -p $(PACK)/$(PACK_NAME)/bin $(PACK)/$(PACK_NAME)/doctest
	cp --parents $(PACK_SOURCES) $(PACK)/$(PACK_NAME)
	echo '#include <doctest/doctest.h>' | $(CXX) -E -x c++ - | sed -n 's/^# 1 "\(.*doctest\.h\)".*/\1/p' \
	  | head -n 1 | xargs -I{} cp {} $(PACK)/$(PACK_NAME)/doctest/
	for p in $(PACK_PROGRAMS); do strip -o $(PACK)/$(PACK_NAME)/bin/$${p##*/} $$p || exit 1; done
	dev/gpu_check.py --describe $(PACK)/$(PACK_NAME)/bin --commit $(COMMIT) --archs '$(ARCHS)' \
	  >$(PACK)/$(PACK_NAME)/pack.json
	tar -C $(PACK) --owner=0 --group=0 -czf $@ $(PACK_NAME)
	@ls -l $@; cat $(PACK)/$(PACK_NAME)/pack.json

# The check is rehearsed in `make test`, with emulated programs. dev/run_tests.sh starts programs without
# words, so the script is copied to the folder where its programs are.
ifeq ($(NO_CUDA),)
$(BUILD)/bench_gpu_emu: $(BUILD)/emulated/dev/bench/bench_gpu_bf16.o $(BUILD)/lib/version.o \
	$(BUILD)/$(EMULATOR)/dynamic_smem.o $(LIBEMU)
	$(call link,$(BUILD)) -rdynamic -ldl
$(BUILD)/bench_gpu_emu: LDLIBS += -Wl,-rpath,$(abspath $(dir $(LIBEMU)))
REHEARSED = bench_gpu_emu $(EMULATED_TRAINERS) \
	$(filter test_gpu_%,$(filter-out test_gpu_ranks%,$(EMULATED_TESTS)))
$(BUILD)/test_gpu_check: dev/test_gpu_check.py dev/gpu_check.py $(REHEARSED:%=$(BUILD)/%) $(PROGRAMS)
	cp $< $@
ifeq ($(shell command -v $(PYTHON) 2>/dev/null),)
SKIPPED_TESTS += "skip:test_gpu_check: $(PYTHON) is missing"
else
CUDA_TESTS += $(BUILD)/test_gpu_check
test: $(BUILD)/test_gpu_check
endif
else
SKIPPED_TESTS += "skip:test_gpu_check: $(NO_CUDA)"
endif
