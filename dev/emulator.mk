# dev/emulator: CUDA code compiled as C++, and a library that replaces cudart, cuBLASLt and NCCL.
# dev/test.mk uses it if the CUDA Toolkit's headers are installed.
.PHONY: need-cuda
CUDA_HOME ?= /usr/local/cuda
ifeq ($(wildcard $(CUDA_HOME)/include/cuda_runtime.h),)
NO_CUDA = the CUDA Toolkit's headers are not in $(CUDA_HOME)/include; install it \
	(https://developer.nvidia.com/cuda-downloads) or name its folder: make CUDA_HOME=DIR
endif
need-cuda:
	@test -z "$(NO_CUDA)" || { echo "make: $(NO_CUDA)" >&2; exit 1; }

# All tests use the same library, without instrumentation. -Bsymbolic-functions makes it use its own instances
# of templates rather than those of an instrumented program.
EMULATOR = dev/emulator
LIBEMU = $(BUILD)/libemu/libemu.so
LIBEMU_OBJECTS = $(patsubst %,$(BUILD)/libemu/$(EMULATOR)/%.o,\
	fiber reports threads warp memory streams host_api cublaslt nccl)
$(eval $(call folder,$(BUILD)/libemu,$(CXX) -std=c++17 -O2 -g1 $(MARCH) -fPIC -ftls-model=initial-exec \
	-Wall -Wextra -isystem $(CUDA_HOME)/include))
$(LIBEMU_OBJECTS): | need-cuda
$(LIBEMU): $(LIBEMU_OBJECTS)
	$(CXX) -shared -Wl,-soname,libemu.so,-Bsymbolic-functions $^ -o $@ -lpthread -lrt

# $(call emulated,DIR): the emulated programs in DIR, made of the objects in DIR/emulated. Those that take
# longest come first.
EMULATED_TESTS = $(foreach t,model attention kernels ranks,test_gpu_$t_bf16 test_gpu_$t_fp32) \
	test_emulator test_nccl
EMULATED_TRAINERS = train_gpt2cu_emu train_gpt2cu_emu_fp32
EMULATED_PROGRAMS = $(EMULATED_TRAINERS) sample_gpt2cu_emu sample_gpt2cu_emu_fp32
EMULATE := -g1 -fno-strict-aliasing $(call probe,-fno-extern-tls-init) -Wno-unknown-pragmas \
	-isystem $(CUDA_HOME)/include -I$(EMULATOR)/shadow -DUSE_NCCL -x c++ -include $(EMULATOR)/emu.h
define emulated
flags.$1/emulated = $$(flags.$1) $(EMULATE)
$1/emulated/%_bf16.o: %.cu $1/emulated/flags | need-cuda need-tests $$(COMPILER)
	$$(call compile,$1/emulated)
$1/emulated/%_fp32.o: DEFINE = -DPRECISION_FP32
$1/emulated/%_fp32.o: %.cu $1/emulated/flags | need-cuda need-tests $$(COMPILER)
	$$(call compile,$1/emulated)
$1/test_gpu_%: $1/emulated/dev/test_gpu_%.o
	$$(call link,$1)
$1/test_emulator $1/test_nccl: $1/%: $1/emulated/dev/emulator/%_bf16.o
	$$(call link,$1)
$1/test_emulator: $1/emulated/dev/emulator/test_architectures_bf16.o
$1/%cu_emu: $1/emulated/%_bf16.o $1/lib/version.o
	$$(call link,$1)
$1/%cu_emu_fp32: $1/emulated/%_fp32.o $1/lib/version.o
	$$(call link,$1)
$(EMULATED_TESTS:%=$1/%): $1/dev/test_main.o $(GEMM:%=$1/%)
$(EMULATED_TESTS:%=$1/%) $(EMULATED_PROGRAMS:%=$1/%): $1/$(EMULATOR)/dynamic_smem.o $(LIBEMU)
$(EMULATED_TESTS:%=$1/%) $(EMULATED_PROGRAMS:%=$1/%): LDLIBS += -Wl,-rpath,$(abspath $(dir $(LIBEMU)))
endef

# The tests whose kernels depend on a device's limits, with those of the architectures that `make test` leaves
# out (EMU_ARCH in dev/emulator/README.md)
.PHONY: test-emulator-archs
ARCH_TESTS = $(foreach t,attention model,$(BUILD)/test_gpu_$t_bf16 $(BUILD)/test_gpu_$t_fp32)
test-emulator-archs: $(ARCH_TESTS) | $(call named,test test-layers test-asan test-portable)
	@for a in 80 89 100 120; do \
	  echo "== EMU_ARCH=$$a"; EMU_ARCH=$$a dev/run_tests.sh $^ || exit 1; done
