# How objects are made, and the checks that what they need is installed.
.PHONY: FORCE
.SECONDARY:
.DELETE_ON_ERROR:
.SECONDEXPANSION:

# Use all cores, unless make was given -j.
ifeq ($(MAKELEVEL),0)
MAKEFLAGS += -j$(shell nproc 2>/dev/null || getconf _NPROCESSORS_ONLN)
endif
# $(call named,TARGETS): those of TARGETS that are on make's command line
named = $(filter $1,$(MAKECMDGOALS))

help-dev:
	@echo "make                           ./train_gpt2 ./sample_gpt2 ./prepare_data (each has --help)"
	@echo "make PORTABLE=1                the same for any processor of this architecture; they choose the best"
	@echo "                               instructions when they start, or ARAPOET_ISA=avx2 etc. chooses"
	@echo "make MPI=1                     ./train_gpt2 for several machines: mpirun -n 4 ./train_gpt2 ..."
	@echo "make NAME                      NAME: $(TOOLS)"
	@echo "  CXX=clang++ ARCH=haswell     another compiler, another processor"
	@echo "  BUILD=build/mine             another folder for objects"
	@echo "make test-layers               only the tests of the model's layers and of the matrix product"
	@echo "make test-mpi                  the CPU trainer on several ranks, over MPI"
	@echo "make test-ranks                ranks of the GPU trainer in the emulator, all combinations of settings"
	@echo "make test-demo                 the page where people write with the poet, and its server, in Chromium"
	@echo "make test-slurm                the scripts in dev/slurm, without Slurm"
	@echo "make test-asan                 all tests with AddressSanitizer and UBSan"
	@echo "make test-portable             the layers' tests for every set of instructions of make PORTABLE=1"
	@echo "make test-emulator-archs       the emulated tests with the limits of every kind of GPU"
	@echo "make test-emulator-asan        the emulated CUDA code with AddressSanitizer and UBSan"
	@echo "make test-emulator-tsan        the same with ThreadSanitizer, which finds races between CUDA threads"
	@echo "make fuzz                      fuzz each reader of files for a minute (needs clang)"
	@echo "make fuzz-request              fuzz the requests to the page's server (FUZZ_SECONDS=60)"
	@echo "make soak                      kill and break the programs while they write (SOAK_SECONDS=60)"
	@echo "make check-fuzzers             check that the fuzzers compile"
	@echo "make format, format-check      format the sources as .clang-format says, or check that they are"
	@echo "make gpu-check                 on a machine with a GPU: speeds and tests, into OUT/gpu-check"
	@echo "make gpu-pack ARCHS=\"80 90\"    the same packed for another machine, which needs no compiler"
	@echo "make device-programs           only build the programs of gpu-check"
	@echo "make check-kernels             kernels' registers, spills, tensor-core instructions (needs nvcc)"
	@echo "make roofline                  recompute the traffic budget, dev/bench/ROOFLINE.md"
	@echo "make scaling                   recompute time and memory on several GPUs, dev/bench/SCALING.md"
	@echo "make bench                     time training steps and sampling, and PyTorch and llm.c if installed"
	@echo "  ROWS=char RUNS=5             fewer rows, more runs  PYTHON=python3  LLMC=path/to/llm.c  PATIENCE=60"
	@echo "make bench-gemm                time the matrix product, and oneDNN and OpenBLAS if installed"
	@echo "                               (SHAPES=124m, char or small)"
	@echo "make golden                    rewrite PyTorch's values (PYTHON= with torch and transformers)"

# --- what is needed in addition to a compiler and make: dev/setup.sh installs it if it can, or says how
NEEDS = need-mpi need-tests need-convert need-plot need-fuzz need-clang need-format
.PHONY: $(NEEDS) need-python
$(NEEDS):
	@CXX="$(CXX)" dev/setup.sh $(@:need-%=%)
PYTHON ?= python3
need-python:
	@command -v $(PYTHON) >/dev/null || { echo "make: $(PYTHON) is missing; install it with:" \
	  "sudo apt-get install python3, or name one: PYTHON=FILE" >&2; exit 1; }

# --- the compiler's command. No -ffast-math, because NaN must stay NaN. Contraction to FMA is wanted.
OPENMP = -fopenmp
MARCH = -march=$(ARCH)
BASE_ARCH = $(if $(filter x86_64,$(shell uname -m)),x86-64,armv8-a)
portable = $(filter-out 0,$(PORTABLE))
ifneq ($(portable),)
override ARCH = $(BASE_ARCH)
endif
UNAME_S := $(shell uname -s)
ifeq ($(UNAME_S),Darwin)
MARCH = $(if $(filter arm64native,$(shell uname -m)$(ARCH)),-mcpu,-march)=$(ARCH)
ifeq ($(filter g++-%,$(CXX)),)
# Apple's clang comes without OpenMP: brew install libomp
LIBOMP ?= $(firstword $(wildcard /opt/homebrew/opt/libomp /usr/local/opt/libomp))
OPENMP = -Xpreprocessor -fopenmp -I$(LIBOMP)/include
LDLIBS += -L$(LIBOMP)/lib -lomp
endif
else ifneq ($(findstring clang,$(CXX)),)
# Elsewhere clang's OpenMP is a separate package.
COMPILER = need-clang
endif
# $(call probe,FLAG) is FLAG if the compiler knows it, else empty.
probe = $(shell $(CXX) -Werror $1 -E -x c++ /dev/null >/dev/null 2>&1 && echo $1)
# When tuned for some processors, g++ does not fuse multiply-adds in a loop that computes a single sum.
# Results would then depend on an element's position in the vector.
FUSE := $(call probe,--param=avoid-fma-max-bits=0)
# The products' loops begin on a cache line: else their speed depends on what is linked before them.
ALIGN := $(call probe,-falign-functions=64 -falign-loops=64)
# $(call command,OPTIMISATION,PROCESSOR)
command = $(CXX) -std=c++17 $1 -ffp-contract=fast $(FUSE) -fno-math-errno -fno-trapping-math $(OPENMP) \
	-Wall -Wextra -I. $2

# --- $(call folder,DIR,COMMAND): the objects in DIR are compiled by COMMAND, and by DEFINE if a rule sets it.
# DIR/flags contains COMMAND. It is rewritten when COMMAND changes, and then all objects are recompiled.
define compile
@mkdir -p $(@D)
$(flags.$1) $(DEFINE) -MMD -MP -c $< -o $@
endef
define folder
flags.$1 = $2
$1/%.o: %.cpp $1/flags | $$(COMPILER)
	$$(call compile,$1)
$(GEMM:%=$1/%): lib/gemm.cpp $1/flags | $$(COMPILER)
	$$(call compile,$1)
$1/lib/gemm_fp32.o: DEFINE = $(ALIGN)
$1/lib/gemm_bf16.o: DEFINE = $(ALIGN) -DGEMM_BF16
$1/lib/version.o: DEFINE = -DARAPOET_COMMIT='"$(COMMIT)"'
$1/lib/version.o: build/commit/flags
$1/data/json.o: build/json/flags | $(if $(filter test%,$(MAKECMDGOALS)),need-tests)
$1/lib/comm_mpi.o: DEFINE = $$(MPI_FLAGS)
$1/lib/comm_mpi.o: | need-mpi
endef
link = $(flags.$1) $(filter %.o %.so,$^) -o $@ $(LDLIBS)

# How mpic++ (OpenMPI's) compiles and links
MPI_FLAGS = $(shell mpic++ --showme:compile)
MPI_LIBS = $(shell mpic++ --showme:link)

# What --version names: the commit, in one small object that is made anew when it has changed.
COMMIT := $(or $(shell git describe --always --dirty --abbrev=7 2>/dev/null),unknown)

# Reading JSON needs a header, and works once that is installed: data/json.o is then made anew. The tests
# install it before they compile data/json.o.
flags.build/json = $(wildcard $(addsuffix /nlohmann/json.hpp,\
	/usr/include /usr/local/include /opt/homebrew/include))

quote = '$(subst ','\'',$1)'
changed = $(or $(call named,clean),$(shell printf '%s\n' $(call quote,$(flags.$1)) \
	| cmp -s - $1/flags || echo FORCE))
%/flags: $$(call changed,$$*)
	@mkdir -p $(@D); printf '%s\n' $(call quote,$(flags.$*)) >$@

flags.build/commit = $(COMMIT)
$(eval $(call folder,$(BUILD),$(call command,$(CXXFLAGS),$(MARCH))))
