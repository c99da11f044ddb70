# Arapoet: GPT-2 on Arabic poetry. `make help` lists the targets for users, `make help-dev` the others. This
# file has the settings, the programs, and the targets that run them. dev/*.mk has the rest: how objects are
# made, the tests, the GPU trainer, the benchmarks.

ifeq ($(origin CXX),default)
CXX = g++
endif
CXXFLAGS ?= -O3
ARCH ?= native
BUILD ?= build
# PORTABLE=1 builds ./train_gpt2 and ./sample_gpt2 for any processor of this architecture (dev/portable.mk).
PORTABLE ?=
# MPI=1 builds a ./train_gpt2 that mpirun or srun can start on several machines (lib/comm_mpi.cpp).
MPI ?=
mpi = $(filter-out 0,$(MPI))
ifneq ($(and $(mpi),$(filter-out 0,$(PORTABLE))),)
$(error make: MPI=1 and PORTABLE=1 do not go together; leave one of them out)
endif

# What `make train` reads, and where it writes, e.g. make train POEMS=poems.csv PRESET=char OUT=out/mine
POEMS ?= data/sample_poems.csv
PRESET ?= tiny
OUT ?= out
# A new run is written here, data included, and takes the place of an earlier one in OUT when it has a model
# (lib/run_folder.h).
NEW = $(OUT)/.new
DATA ?= $(NEW)/data
TRAIN_FLAGS ?=
PREPARE_FLAGS ?=
# What `make finetune` starts from: HF, a folder as Hugging Face publishes it, with config.json,
# model.safetensors and the tokenizer's files; or FROM, a model file trained here, with tokenizer.bin in
# the same folder
HF ?=
FROM ?=
# `make plot OUT="out/a out/b"` compares runs: against steps, tokens or seconds of training, in this image
AXIS ?= steps
COMPARED ?= out/compared.png
# Where `make ladder` writes
LADDER ?= $(OUT)/ladder
LADDER_FLAGS ?=

PROGRAMS = train_gpt2 sample_gpt2 prepare_data
TOOLS = convert_gpt2 export_tokenizer tokenize score_poems ngram export_run
# The matrix product, compiled for bf16 and for fp32. The object that takes longest comes first.
GEMM = lib/gemm_bf16.o lib/gemm_fp32.o

.PHONY: all train ladder finetune export plot help help-dev clean
all: $(PROGRAMS)

help:
	@echo "make train                     teach a small GPT-2 the built-in poems (a minute on 2 cores)"
	@echo "make train POEMS=poems.csv     the same on your poems: CSV, JSON, plain text, or a folder of these"
	@echo "  PRESET=char OUT=out/mine     a larger model (tiny, char, gpt2, gpt2-medium, ...), another folder"
	@echo "  TRAIN_FLAGS='--max_steps 9'  more flags for ./train_gpt2; PREPARE_FLAGS= for ./prepare_data"
	@echo "make finetune HF=DIR POEMS=..  fine-tune a checkpoint in Hugging Face's form (GPT-2, AraGPT2)"
	@echo "make finetune FROM=FILE ..     the same from a checkpoint trained here, e.g. FROM=out/model.bin"
	@echo "make export OUT=out/mine       write it in Hugging Face's form to OUT/hf (HF=DIR: with its tokenizer)"
	@echo "make plot                      draw the losses of OUT/log.csv to OUT/loss.png"
	@echo "  OUT='out/a out/b'            several runs in $(COMPARED); AXIS=steps, tokens or seconds"
	@echo "make ladder                    from a bigram table to GPT-2's block, rung by rung (dev/ladder)"
	@echo "make demo                      a page where you write with the poet: http://127.0.0.1:8080"
	@echo "  MODEL=out/mine/model.bin     another model; PORT=9000, GPU=1"
	@echo "make test                      build and run all tests that need no GPU"
	@echo "make train_gpt2cu              the GPU trainer ./train_gpt2cu (PRECISION=BF16 or FP32; needs nvcc)"
	@echo "make sample_gpt2cu             the same for ./sample_gpt2: ./sample_gpt2cu writes poems on a GPU"
	@echo "make clean                     remove programs and objects, not data or models (make help-dev: more)"

include dev/build.mk

# --- targets that run programs. They share the programs and OUT, so if several are given on one command line,
# each waits for those that are listed before it here.

# One file, whose name may have spaces, or several without
poems = $(if $(shell test -e $(call quote,$(POEMS)) && echo one),$(call quote,$(POEMS)),$(POEMS))
# DATA=DIR alone trains on token files that are there; with POEMS= they are made anew.
own_data = $(and $(filter command environment,$(word 1,$(origin DATA))),$(filter file,$(origin POEMS)),\
	$(shell test -e $(call quote,$(DATA)/train.bin) && echo there))
train: $(PROGRAMS)
	$(if $(own_data),,./prepare_data $(poems) -o $(call quote,$(DATA)) $(PREPARE_FLAGS))
	./train_gpt2 --data $(call quote,$(DATA)) --preset $(PRESET) -o $(call quote,$(OUT)) --overwrite \
	  $(TRAIN_FLAGS)

# The program is linked in BUILD and copied, because `make ladder` is the target that runs it.
ladder: prepare_data $(BUILD)/ladder | need-plot $(call named,train)
	cp $(BUILD)/ladder ladder
	./prepare_data $(poems) -o $(call quote,$(LADDER)/data) $(PREPARE_FLAGS)
	./ladder --data $(call quote,$(LADDER)/data) --rung 0-7 -o $(call quote,$(LADDER)) $(LADDER_FLAGS)
	gnuplot -c dev/ladder/ladder.gp $(call quote,$(LADDER))
	@echo "plots: $(LADDER)/bars.png, $(LADDER)/curves.png"

# What this target must be told is asked for before anything is compiled.
ifneq ($(and $(call named,finetune),$(if $(HF)$(FROM),,none)),)
$(error make finetune: name the checkpoint: make finetune HF=DIR POEMS=poems.csv, or FROM=out/model.bin)
endif
# Training moves what is in NEW to OUT.
FINETUNE_DATA = $(patsubst $(NEW)/%,$(OUT)/%,$(DATA))
finetune: $(PROGRAMS) score_poems $(if $(FROM),,convert_gpt2 export_tokenizer) | $(call named,train ladder)
	@mkdir -p $(call quote,$(NEW))
ifeq ($(FROM),)
	./convert_gpt2 from-hf $(call quote,$(HF)) $(call quote,$(NEW)/pretrained.bin)
	./export_tokenizer $(call quote,$(HF)) $(call quote,$(NEW)/pretrained_tokenizer.bin)
	./prepare_data $(poems) -o $(call quote,$(DATA)) --tokenizer $(call quote,$(NEW)/pretrained_tokenizer.bin) \
	  $(PREPARE_FLAGS)
	./train_gpt2 -e $(call quote,$(NEW)/pretrained.bin) --data $(call quote,$(DATA)) -o $(call quote,$(OUT)) \
	  --overwrite $(TRAIN_FLAGS)
else
	./prepare_data $(poems) -o $(call quote,$(DATA)) \
	  --tokenizer "$$(dirname $(call quote,$(FROM)))"/tokenizer.bin $(PREPARE_FLAGS)
	./train_gpt2 -e $(call quote,$(FROM)) --data $(call quote,$(DATA)) -o $(call quote,$(OUT)) --overwrite \
	  $(TRAIN_FLAGS)
endif
	@dev/finetune_report.sh $(call quote,$(if $(FROM),$(FROM),$(OUT)/pretrained.bin)) \
	  $(call quote,$(OUT)/tokenizer.bin) $(call quote,$(OUT)) $(call quote,$(FINETUNE_DATA))

export: convert_gpt2 | $(call named,train ladder finetune)
	./convert_gpt2 to-hf $(call quote,$(OUT)/model.bin) $(call quote,$(OUT)/hf)$(if $(HF), \
	  --tokenizer_dir $(call quote,$(HF)))

# Several runs, unless the name of one has spaces
several = $(and $(word 2,$(OUT)),$(if $(shell test -e $(call quote,$(OUT)) && echo one),,several))
plot: | need-plot $(call named,train ladder finetune export)
ifneq ($(several),)
	@mkdir -p "$$(dirname $(call quote,$(COMPARED)))"
	dev/plot/compare.sh $(call quote,$(AXIS)) $(call quote,$(COMPARED)) \
	  $(foreach run,$(OUT),$(call quote,$(run)))
else
	@test -s $(call quote,$(OUT)/log.csv) || { \
	  echo "make plot: $(OUT)/log.csv is missing; make train writes it" >&2; exit 1; }
	gnuplot -c dev/plot/loss.gp $(call quote,$(OUT))
endif

# --- the programs. They are in the root, whichever BUILD they come from, and are relinked when BUILD changes.
ifeq ($(portable),)
# sample_gpt2.o has a main, which the linker prefers to the weak main of train_gpt2.o.
train_gpt2: $(BUILD)/lib/gemm_bf16.o $(BUILD)/train_gpt2.o $(BUILD)/lib/gemm_fp32.o
train_gpt2: $(mpi:%=$(BUILD)/lib/comm_mpi.o)
train_gpt2: LDLIBS += $(if $(mpi),$(MPI_LIBS))
sample_gpt2: $(BUILD)/sample_gpt2.o $(BUILD)/train_gpt2.o $(GEMM:%=$(BUILD)/%)
train_gpt2 sample_gpt2: build/programs/flags
	$(call link,$(BUILD))
else
train_gpt2 sample_gpt2: %: $(BUILD)/portable/% build/programs/flags
	cp $< $@
endif
prepare_data: $(BUILD)/data/prepare_data.o $(BUILD)/data/json.o
convert_gpt2: $(BUILD)/dev/convert/convert_gpt2.o
export_tokenizer tokenize: %: $(BUILD)/tokenizer/%.o
score_poems: $(BUILD)/dev/ladder/score_poems.o $(BUILD)/data/json.o
ngram: $(BUILD)/dev/ladder/ngram.o
export_run: $(BUILD)/dev/ladder/export_run.o $(GEMM:%=$(BUILD)/%)
prepare_data $(TOOLS): build/programs/flags
	$(call link,$(BUILD))
$(PROGRAMS) $(TOOLS) $(BUILD)/ladder: $(BUILD)/lib/version.o
$(BUILD)/dev/convert/convert_gpt2.o $(BUILD)/tokenizer/export_tokenizer.o: | need-convert
$(BUILD)/ladder: $(BUILD)/dev/ladder/ladder.o $(GEMM:%=$(BUILD)/%)
	$(call link,$(BUILD))
flags.build/programs = $(flags.$(BUILD)) $(BUILD) $(portable) $(mpi)

clean:
	rm -f $(PROGRAMS) $(TOOLS) serve_gpt2 train_gpt2cu sample_gpt2cu serve_gpt2cu
	test -d ladder || rm -f ladder
	rm -rf build $(if $(wildcard $(BUILD)/flags),$(BUILD))

include dev/emulator.mk dev/test.mk dev/portable.mk dev/gpu.mk dev/gpu_pack.mk dev/bench.mk dev/demo.mk
# The dependencies that the compiler found
-include $(shell find build $(BUILD) -name '*.d' 2>/dev/null)
