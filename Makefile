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

.PHONY: all help train plot test test-asan clean
all: $(PROGRAMS)

help:
	@echo "make train                     teach a small GPT-2 the built-in poems (a minute on 2 cores)"
	@echo "make train POEMS=poems.csv     the same on your poems: CSV with a column poem_text, or plain text"
	@echo "           PRESET=char         a larger model (tiny, char, gpt2, gpt2-medium, gpt2-large, gpt2-xl)"
	@echo "           OUT=out/mine        another folder   TRAIN_FLAGS='--max_steps 3000'   more flags"
	@echo "make plot                      draw the losses of OUT/log.csv to OUT/loss.png"
	@echo "make test                      build and run all tests that need no GPU"
	@echo "make test-asan                 the same under AddressSanitizer and UBSan"
	@echo "make                           build ./train_gpt2 ./sample_gpt2 ./prepare_data (each has --help)"
	@echo "make clean                     remove the programs (never your data or models)"

train: $(PROGRAMS)
	./prepare_data $(POEMS) -o $(DATA)
	./train_gpt2 --data $(DATA) --preset $(PRESET) -o $(OUT) --overwrite $(TRAIN_FLAGS)

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

# --- tests: one program from several files; test_gpt2.cpp has its main
TEST_SOURCES = test_gpt2.cpp $(wildcard data/test_*.cpp tokenizer/test_*.cpp dev/test_*.cpp dev/*/test_*.cpp)
TEST_OBJECTS = $(TEST_SOURCES:%.cpp=$(BUILD)/%.o)

test: $(PROGRAMS)
	@dev/setup.sh tests
	@$(MAKE) --no-print-directory -j$$(nproc) $(BUILD)/test_gpt2
	$(BUILD)/test_gpt2

test-asan:
	@$(MAKE) --no-print-directory test BUILD=build/asan PROGRAMS="$(PROGRAMS)" CXXFLAGS="-O1 -g -fsanitize=address,undefined -fno-sanitize-recover=all"

$(BUILD)/test_gpt2: $(TEST_OBJECTS)
	$(CXX) $(FLAGS) $^ -o $@
$(BUILD)/%.o: %.cpp train_gpt2.cpp sample_gpt2.cpp data/prepare_data.cpp $(wildcard dev/convert/*.cpp) $(HEADERS)
	@mkdir -p $(@D)
	$(CXX) $(FLAGS) -DARAPOET_NO_MAIN -c $< -o $@

clean:
	rm -rf $(PROGRAMS) build
