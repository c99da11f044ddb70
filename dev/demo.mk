# The page where people write with the poet (dev/demo): ./serve_gpt2, and its tests.
.PHONY: demo test-demo fuzz-request need-demo need-browser
# The model that `make demo` serves, or several. Without OUT/model.bin, `make train` makes it first.
MODEL ?= $(OUT)/model.bin
PORT ?= 8080
DEMO_FLAGS ?=
# GPU=1 serves with the model of train_gpt2.cu.
GPU ?=
SERVER = ./serve_gpt2$(if $(filter-out 0,$(GPU)),cu)

need-demo need-browser:
	@dev/setup.sh $(@:need-%=%)
HTTP_FLAGS = $(shell pkg-config --cflags cpp-httplib)
HTTP_LIBS = $(shell pkg-config --libs cpp-httplib) -pthread
$(BUILD)/dev/demo/serve_gpt2.o: DEFINE = $(HTTP_FLAGS)
PAGE = dev/demo/page.html dev/demo/page.css dev/demo/page.js
$(BUILD)/dev/demo/serve_gpt2.o: $(PAGE) build/http/flags | need-demo
# It is made anew when the library is another one.
flags.build/http = $(shell pkg-config --modversion cpp-httplib 2>/dev/null)
serve_gpt2: $(BUILD)/dev/demo/serve_gpt2.o $(BUILD)/train_gpt2.o $(BUILD)/data/json.o \
	$(BUILD)/lib/version.o $(GEMM:%=$(BUILD)/%) build/programs/flags
	$(call link,$(BUILD)) $(HTTP_LIBS)

# sample_gpt2.cu serves, too, if SERVE_GPT2 is defined.
serve_gpt2cu: sample_gpt2.cu $(BUILD)/data/json.o $(BUILD)/lib/version.o $(PAGE) build/nvcc/flags | need-demo
	$(flags.build/nvcc) -DSERVE_GPT2 $(HTTP_FLAGS) -MMD -MP -MF build/nvcc/$@.d $(filter %.cu %.o,$^) -o $@ \
	  $(CUDA_LIBS) $(filter-out -pthread,$(HTTP_LIBS))

# `make demo MODEL=...` serves what is named. Without MODEL it serves OUT/model.bin, which `make train` makes
# of POEMS where it is missing. To name POEMS when OUT has a model already is an error: that model may have
# learnt other poems, and would be served as if it had learnt these.
#
# MODEL is one file, whose name may have spaces, or several without.
models = $(if $(or $(filter file,$(origin MODEL)),$(shell test -e $(call quote,$(MODEL)) && echo one)),\
	$(call quote,$(MODEL)),$(MODEL))
demo: need-demo $(PROGRAMS) $(SERVER:./%=%) | $(call named,train ladder finetune)
	$(if $(and $(filter file,$(origin MODEL)),$(filter-out file,$(origin POEMS))),\
	  @test ! -e $(call quote,$(MODEL)) || { \
	  echo "make demo: $(OUT) has a model; to train on POEMS name another folder: OUT=DIR" >&2; exit 1; })
	$(if $(filter file,$(origin MODEL)),test -e $(call quote,$(MODEL)) || $(MAKE) train)
	$(SERVER) $(models) --port $(PORT) $(DEMO_FLAGS)

# The server's promises, and the page's in a real browser: three minutes at most
SELENIUM = build/selenium
$(SELENIUM)/installed: | need-python need-demo need-browser
	$(PYTHON) -m venv $(SELENIUM) && $(SELENIUM)/bin/pip install -q selenium openai && touch $@
DEMO_TEST = $(BUILD)/test_demo
$(DEMO_TEST)/model.bin: $(PROGRAMS)
	rm -rf $(DEMO_TEST) && mkdir -p $(DEMO_TEST)
	./prepare_data data/sample_poems.csv -o $(DEMO_TEST)/data >/dev/null
	./train_gpt2 --data $(DEMO_TEST)/data -o $(DEMO_TEST) --overwrite --max_steps 200 --log_every 100 >/dev/null
# A model with tags of two columns
$(DEMO_TEST)/tagged/model.bin: $(DEMO_TEST)/model.bin
	./prepare_data data/sample_poems.csv --tags poem_meter,poet_name --tag_min 1 -o $(@D)/data >/dev/null
	./train_gpt2 --data $(@D)/data -o $(@D) --overwrite --max_steps 20 --log_every 20 >/dev/null
test-demo: serve_gpt2 $(DEMO_TEST)/model.bin $(DEMO_TEST)/tagged/model.bin $(SELENIUM)/installed
	$(flags.$(BUILD)) $(HTTP_FLAGS) -fsyntax-only dev/demo/fuzz_request.cpp  # compiles without clang, too
	$(SELENIUM)/bin/python dev/demo/test_serve.py --openai --tagged $(DEMO_TEST)/tagged/model.bin \
	  --command './serve_gpt2 $(DEMO_TEST)/model.bin'
	$(SELENIUM)/bin/python dev/demo/test_page.py --command './serve_gpt2 $(DEMO_TEST)/model.bin --port 8123'

# Mutated requests, for FUZZ_SECONDS
FUZZ_REQUEST = dev/demo/fuzz_request.cpp data/json.cpp lib/version.cpp
fuzz-request: $(FUZZ_REQUEST) $(PAGE) | need-demo need-fuzz
	@mkdir -p $(FUZZ)
	$(FUZZ_COMMAND) -march=$(ARCH) -fopenmp $(HTTP_FLAGS) $(FUZZ_REQUEST) -o $(FUZZ)/fuzz_request $(HTTP_LIBS)
	$(FUZZ)/fuzz_request -max_total_time=$(FUZZ_SECONDS) -max_len=4096 -artifact_prefix=$(FUZZ)/ \
	  -print_final_stats=1
