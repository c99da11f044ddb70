# The GPU trainer, and sample_gpt2 with its model, compiled for the GPUs of this machine, or if there is none,
# for Ampere, Hopper, Blackwell and later ones (dev/gpu_archs.sh).
.PHONY: check-kernels roofline scaling need-nvcc need-archs need-precision need-gpu
PRECISION ?= BF16
NVCC ?= $(shell command -v nvcc || ls $(CUDA_HOME)/bin/nvcc 2>/dev/null)
# $(call once,NAME,VALUE): VALUE, which is computed when NAME is first used, and not again
once = $(eval $1 := $2)$($1)
# ARCHS="80 90" names architectures instead. Each is compiled to machine code, and to PTX for later GPUs.
ARCHS = $(call once,ARCHS,$(shell dev/gpu_archs.sh $(NVCC) 2>/dev/null))
CODE = $(foreach a,$1,-gencode arch=compute_$a,code=[sm_$a,compute_$a])
# The toolkit's folders, as nvcc gives them to the host's compiler: -I... -L...
toolkit = $(call once,toolkit,$(shell $(NVCC) --dryrun -x cu - </dev/null 2>&1 \
	| sed -n -e 's/"//g' -e 's/^.. INCLUDES=//p' -e 's/^.. LIBRARIES=//p'))
# nvcc compiles and links the host's code with g++.
HOST_CXX = $(or $(NVCC_CCBIN),g++)
# $(call library,NAME): the folder of libNAME.so, empty if the linker does not find it. The toolkit's stubs
# have the same names, but no code.
library = $(realpath $(dir $(filter /%,$(shell $(HOST_CXX) \
	$(patsubst -L%,-B%,$(filter-out %/stubs,$(filter -L%,$(toolkit)))) -print-file-name=lib$1.so))))
# Several GPUs train together where NCCL is installed. `make train_gpt2cu NCCL=` leaves it out.
NCCL = $(call once,NCCL,$(and $(call library,nccl),$(shell \
	$(HOST_CXX) $(filter -I%,$(toolkit)) -include nccl.h -E -x c++ /dev/null >/dev/null 2>&1 && echo yes)))
# The program finds the libraries where they are now, without LD_LIBRARY_PATH.
CUDA_LIBS = $(call once,CUDA_LIBS,-lcublasLt $(NCCL:%=-lnccl) $(patsubst %,-Xlinker -rpath -Xlinker %,\
	$(sort $(call library,cublasLt) $(if $(NCCL),$(call library,nccl)))))
nvcc = $(NVCC) -std=c++17 -O3 --threads 0 -I. -Xcompiler -fopenmp,-Wall,-Wextra $(NCCL:%=-DUSE_NCCL) \
	$(call CODE,$(ARCHS))

need-nvcc:
	@test -n "$(NVCC)" || { echo "make train_gpt2cu: nvcc is neither on the PATH nor in $(CUDA_HOME)/bin;" \
	  "install the CUDA Toolkit, 12 or later (https://developer.nvidia.com/cuda-downloads)," \
	  "or name it: make train_gpt2cu NVCC=FILE" >&2; exit 1; }
need-archs: need-nvcc
	@$(if $(filter file,$(origin ARCHS)),dev/gpu_archs.sh $(NVCC) >/dev/null)
need-precision:
	@case '$(PRECISION)' in BF16|FP32) ;; \
	  FP16) echo "make train_gpt2cu: PRECISION=FP16 is not supported, its range is too small for gradients" \
	    "without loss scaling; take BF16" >&2; exit 2;; \
	  *) echo "make train_gpt2cu: PRECISION=$(PRECISION) is unknown; known are BF16, FP32" >&2; exit 2;; esac
need-gpu:
	@nvidia-smi >/dev/null 2>&1 || { echo "make gpu-check: nvidia-smi finds no GPU here;" \
	  "make test runs the same tests in the emulator" >&2; exit 1; }

flags.build/nvcc = $(nvcc) $(if $(filter FP32,$(PRECISION)),-DPRECISION_FP32)
build/nvcc/flags: | need-archs need-precision
train_gpt2cu sample_gpt2cu: %cu: %.cu $(BUILD)/lib/version.o build/nvcc/flags
	$(flags.build/nvcc) -MMD -MP -MF build/nvcc/$@.d $(filter %.cu %.o,$^) -o $@ $(CUDA_LIBS)

# What nvcc compiles the kernels to, and the computed traffic budget. Neither needs a GPU.
check-kernels: check-kernels-bf16 check-kernels-fp32
check-kernels-%: need-nvcc need-python
	$(PYTHON) dev/check_kernels.py --nvcc $(NVCC) $(if $(filter fp32,$*),--fp32)
roofline: | need-python
	$(PYTHON) dev/bench/roofline.py
# The computed time and memory of several GPUs, and whether the emulated trainer sends and takes as much
scaling: $(BUILD)/train_gpt2cu_emu | need-python
	$(PYTHON) dev/bench/scaling.py
	$(PYTHON) dev/bench/scaling.py --emulator $<
