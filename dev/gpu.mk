# The GPU trainer, compiled for the GPUs of this machine, or if there is none, for Ampere, Hopper, Blackwell
# and later ones.
.PHONY: gpu-check device-programs check-kernels roofline need-nvcc need-precision need-gpu
PRECISION ?= BF16
NVCC ?= $(shell command -v nvcc || ls $(CUDA_HOME)/bin/nvcc 2>/dev/null)
GPUS = $(shell nvidia-smi --query-gpu=compute_cap --format=csv,noheader 2>/dev/null \
	| sed -n 's/^\([0-9]*\)\.\([0-9]*\)$$/\1\2/p' | sort -u)
ARCHS = $(or $(GPUS),$(patsubst sm_%,%,$(filter sm_80 sm_90 sm_100,\
	$(if $(NVCC),$(shell $(NVCC) --list-gpu-code)))))
CODE = $(foreach a,$1,-gencode arch=compute_$a,code=sm_$a) \
	-gencode arch=compute_$(lastword $1),code=compute_$(lastword $1)
nvcc = $(NVCC) -std=c++17 -O3 --threads 0 -I. -Xcompiler -fopenmp,-Wall,-Wextra $(call CODE,$(ARCHS))

need-nvcc:
	@test -n "$(NVCC)" || { echo "make train_gpt2cu: nvcc is neither on the PATH nor in $(CUDA_HOME)/bin;" \
	  "install the CUDA Toolkit, 12 or later (https://developer.nvidia.com/cuda-downloads)," \
	  "or name it: make train_gpt2cu NVCC=FILE" >&2; exit 1; }
need-precision:
	@case '$(PRECISION)' in BF16|FP32) ;; \
	  FP16) echo "make train_gpt2cu: PRECISION=FP16 is not supported, its range is too small for gradients" \
	    "without loss scaling; take BF16" >&2; exit 2;; \
	  *) echo "make train_gpt2cu: PRECISION=$(PRECISION) is unknown; known are BF16, FP32" >&2; exit 2;; esac
need-gpu:
	@nvidia-smi >/dev/null 2>&1 || { echo "make gpu-check: nvidia-smi finds no GPU here;" \
	  "make test runs the same tests in the emulator" >&2; exit 1; }

flags.build/nvcc = $(nvcc) $(if $(filter FP32,$(PRECISION)),-DPRECISION_FP32)
build/nvcc/flags: | need-nvcc need-precision
train_gpt2cu: train_gpt2.cu $(BUILD)/lib/version.o build/nvcc/flags
	$(flags.build/nvcc) -MMD -MP -MF build/nvcc/train_gpt2cu.d $(filter %.cu %.o,$^) -o $@ -lcublasLt

# What nvcc compiles the kernels to, and the computed traffic budget. Neither needs a GPU.
check-kernels: check-kernels-bf16 check-kernels-fp32
check-kernels-%: need-nvcc need-python
	$(PYTHON) dev/check_kernels.py --nvcc $(NVCC) $(if $(filter fp32,$*),--fp32)
roofline: | need-python
	$(PYTHON) dev/bench/roofline.py

# On a machine with a GPU: runs the emulator's tests on the device, and writes speeds to
# dev/bench/gpu-NAME.md.
DEVICE = $(BUILD)/device
DEVICE_TESTS = $(foreach t,kernels attention model,$(DEVICE)/test_gpu_$t_bf16 $(DEVICE)/test_gpu_$t_fp32)
flags.$(DEVICE) = $(nvcc) -Xcompiler -march=$(ARCH) -diag-suppress 1675
$(DEVICE)/flags: | need-nvcc
gpu-check: device-programs | need-gpu
	dev/gpu_check.sh $(DEVICE)
device-programs: $(DEVICE_TESTS) $(DEVICE)/bench_gpu_bf16 $(DEVICE)/bench_gpu_fp32
$(DEVICE)/%: DEFINE = $(if $(filter %_fp32 %_fp32.o,$@),-DPRECISION_FP32)
define device
$(DEVICE)/test_gpu_%_$1.o: dev/test_gpu_%.cu $(DEVICE)/flags | need-tests
	$$(call compile,$(DEVICE))
$(DEVICE)/bench_gpu_$1.o: dev/bench/bench_gpu.cu $(DEVICE)/flags
	$$(call compile,$(DEVICE))
endef
$(foreach p,bf16 fp32,$(eval $(call device,$p)))
$(DEVICE_TESTS): %: %.o $(BUILD)/dev/test_main.o $(GEMM:%=$(BUILD)/%)
	$(flags.$(DEVICE)) $(filter %.o,$^) -o $@ -lcublasLt
$(DEVICE)/bench_gpu_bf16 $(DEVICE)/bench_gpu_fp32: %: %.o
	$(flags.$(DEVICE)) $< -o $@ -lcublasLt
