// Feeds mutated checkpoints to convert_gpt2 under libFuzzer, AddressSanitizer and UBSan:
//
//     clang++ -std=c++17 -g -O1 -I. -fsanitize=fuzzer,address,undefined -fno-sanitize-recover=all
//         -o fuzz_safetensors dev/convert/fuzz_safetensors.cpp
//     ./fuzz_safetensors -max_total_time=60 -max_len=16384
//
// The first byte of an input chooses which file of a small valid folder the rest replaces. Each input must
// be converted and converted back, or be refused with an Error; anything else is a finding.
#define ARAPOET_NO_MAIN
#include "convert_gpt2.cpp"
#include "dev/fuzz.h"

namespace {

using fuzz::read, fuzz::write;

enum Mode { CONFIG, HEADER, WHOLE_FILE, INDEX, TOKENIZER, MODEL, NUM_MODES };

const convert::Json CONFIG_JSON = {{"model_type", "gpt2"}, {"n_layer", 2},    {"n_head", 2},
                                   {"n_embd", 4},          {"vocab_size", 5}, {"n_positions", 3}};

// A temporary folder with a valid model, and its files' contents.
struct Valid : fuzz::Folder {
    std::string header, data, tokenizer = "{\"a\": 0, \"<|endoftext|>\": 4}", index, model;
    Valid() {
        write(dir + "/config.json", CONFIG_JSON.dump());
        Config c = convert::config_from_json(convert::JsonFile(dir + "/config.json"));
        convert::SafetensorsWriter w(dir + "/model.safetensors", convert::slots_of(c), false);
        std::vector<float> x(num_params(c) - (size_t)(c.Vp - c.V) * c.C);
        for (size_t i = 0; i < x.size(); i++) x[i] = (float)i;
        w.add(x.data(), x.size());
        w.commit();
        std::string file = read(dir + "/model.safetensors");
        uint64_t length;
        memcpy(&length, file.data(), 8);
        header = file.substr(8, length), data = file.substr(8 + length);
        convert::Json map;
        for (const convert::Slot& s : convert::slots_of(c))
            map["transformer." + s.name] = "model-1.safetensors";
        index = convert::Json({{"weight_map", map}}).dump();
        convert::from_hf(dir, dir + "/valid.bin");
        model = read(dir + "/valid.bin");
    }
    std::string seed(Mode m) const {
        uint64_t length = header.size();
        switch (m) {
            case CONFIG:
                return CONFIG_JSON.dump();
            case HEADER:
                return header;
            case WHOLE_FILE:
                return std::string((const char*)&length, 8) + header + data;
            case INDEX:
                return index;
            case TOKENIZER:
                return tokenizer;
            default:
                return model;
        }
    }
};
const Valid& valid() {
    static const Valid v;
    return v;
}

}  // namespace

extern "C" size_t LLVMFuzzerCustomMutator(uint8_t* data, size_t size, size_t max_size, unsigned seed) {
    return fuzz::mutate(data, size, max_size, seed, NUM_MODES,
                        [](int mode) { return valid().seed((Mode)mode); });
}

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
    const Valid& v = valid();
    if (size < 1) return 0;
    Mode mode = (Mode)(data[0] % NUM_MODES);
    std::string text((const char*)data + 1, size - 1), file = text;
    uint64_t length = text.size();
    if (mode == HEADER) file = std::string((const char*)&length, 8) + text + v.data;
    std::string st = v.dir + "/model.safetensors", index = st + ".index.json",
                shard = v.dir + "/model-1.safetensors";
    unlink(index.c_str()), unlink(st.c_str());
    write(v.dir + "/config.json", mode == CONFIG ? text : CONFIG_JSON.dump());
    write(mode == INDEX ? shard : st, mode == HEADER || mode == WHOLE_FILE ? file : v.seed(WHOLE_FILE));
    if (mode == INDEX) write(index, text);
    write(v.dir + "/vocab.json", mode == TOKENIZER ? text : v.tokenizer);
    write(v.dir + "/tokenizer.json", mode == TOKENIZER ? text : v.tokenizer);
    write(v.dir + "/merges.txt", "a a");
    write(v.dir + "/out.bin", mode == MODEL ? text : v.model);
    try {
        if (mode != MODEL && mode != TOKENIZER) convert::from_hf(v.dir, v.dir + "/out.bin");
        convert::to_hf(v.dir + "/out.bin", v.dir + "/back", v.dir);
        // Whatever was accepted is a model, so another round trip must not change it.
        std::string published = read(v.dir + "/back/model.safetensors");
        convert::from_hf(v.dir + "/back", v.dir + "/again.bin");
        convert::to_hf(v.dir + "/again.bin", v.dir + "/back", v.dir);
        if (read(v.dir + "/back/model.safetensors") != published) abort();
    } catch (const Error& e) {
        if (strchr(e.what(), '\n')) abort();  // errors are one line
    }
    return 0;
}
