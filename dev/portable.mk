# make PORTABLE=1: programs that contain a variant for each set of instructions, and choose one when they
# start (dev/portable.cpp). BASE_ARCH is in dev/build.mk.
.PHONY: test-portable need-binutils
ISAS = $(if $(filter x86-64,$(BASE_ARCH)),generic avx2 avx512 avx512bf16,generic)
MARCH_generic = -march=$(BASE_ARCH)
MARCH_avx2 = -march=x86-64-v3
MARCH_avx512 = -march=x86-64-v4
MARCH_avx512bf16 = -march=x86-64-v4 -mavx512bf16
PDIR = $(BUILD)/portable

# A variant consists of a program's objects, joined into one. All symbols except the renamed main are made
# local, so that the linker cannot use an instance of a template from another variant. The join prefers
# sample_gpt2's main to the weak main of train_gpt2.
LOCAL := $(call probe,-fno-gnu-unique)
define variant
$(call folder,$(PDIR)/$1,$(call command,$(CXXFLAGS) $(LOCAL),$(MARCH_$1)))
$(PDIR)/$1/train_gpt2.o $(PDIR)/$1/sample_gpt2.o: DEFINE = -Dmain=run_$1
$(PDIR)/train_gpt2.$1.o: $(PDIR)/$1/train_gpt2.o $(GEMM:%=$(PDIR)/$1/%) $(PDIR)/$1/lib/version.o
$(PDIR)/sample_gpt2.$1.o: $(PDIR)/$1/sample_gpt2.o $(PDIR)/$1/train_gpt2.o $(GEMM:%=$(PDIR)/$1/%) \
	$(PDIR)/$1/lib/version.o
$(PDIR)/train_gpt2.$1.o $(PDIR)/sample_gpt2.$1.o: | need-binutils
	ld -r --force-group-allocation $$^ -o $$@.joined
	objcopy --wildcard --keep-global-symbol='_Z*run_$1iPPc' $$@.joined $$@
	@rm $$@.joined
endef
$(foreach i,$(ISAS),$(eval $(call variant,$i)))
$(PDIR)/%.main.o: DEFINE = -DPROGRAM='"$(*F)"' -DVARIANTS="$(foreach i,$(ISAS),V($i))"
$(PDIR)/%.main.o: dev/portable.cpp $(PDIR)/generic/flags | $$(COMPILER)
	$(call compile,$(PDIR)/generic)
$(PDIR)/train_gpt2 $(PDIR)/sample_gpt2: %: %.main.o $(foreach i,$(ISAS),%.$i.o)
	$(call link,$(PDIR)/generic)
need-binutils:
	@command -v objcopy >/dev/null || { echo "make PORTABLE=1: ld and objcopy are missing; install them with:" \
	  "sudo apt-get install binutils" >&2; exit 1; }

# The layers' tests for each set of instructions, and the choice among the sets. AVX2 is tested with the
# tuning for a processor for which g++ avoids fused multiply-adds (dev/build.mk).
TUNED = $(PDIR)/avx2-tuned
$(eval $(call folder,$(TUNED),$(call command,$(CXXFLAGS) -mtune=znver3,$(MARCH_avx2))))
define layers
$(LAYER_TESTS:%=$2/%) $(PDIR)/generic/dev/test_main.o: | need-tests
$(PDIR)/test_gpt2.$1: $(LAYER_TESTS:%=$2/%) $(GEMM:%=$2/%) $(PDIR)/generic/dev/test_main.o
	$$(call link,$2)
endef
$(foreach i,$(ISAS),$(eval $(call layers,$i,$(if $(filter avx2,$i),$(TUNED),$(PDIR)/$i))))
test-portable: $(ISAS:%=$(PDIR)/test_gpt2.%) $(PDIR)/train_gpt2 $(PDIR)/sample_gpt2 prepare_data \
	| $(call named,test test-layers test-asan)
	@dev/test_portable.sh $(PDIR) $(ISAS)
