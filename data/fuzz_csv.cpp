// Feeds arbitrary bytes to prepare_data as a CSV or a text file, under libFuzzer, AddressSanitizer and UBSan
// (make fuzz). Each input must either be refused with an Error or be written to files that load again. The
// input's first byte chooses the options; the rest is the file.
#define ARAPOET_NO_MAIN
#include "dev/fuzz.h"
#include "prepare_data.cpp"

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
    static const fuzz::Folder folder;
    const std::string& dir = folder.dir;
    if (!size) return 0;
    prep::Options o;
    o.files = {dir + "/in"}, o.out = dir + "/out";
    o.format = data[0] & 1 ? "csv" : "text", o.on_error = data[0] & 2 ? "skip" : "fail",
    o.keep = data[0] & 4 ? "all" : "letters";
    o.normalize_alef = o.normalize_hamza = o.normalize_ya = o.normalize_ta = o.remove_tatweel =
        o.remove_tashkeel = data[0] & 8;
    std::string text((const char*)data + 1, size - 1);
    if (data[0] & 1 && data[0] & 16) text = "id,poem_text\n" + text;
    fuzz::write(o.files[0], text);
    try {
        prep::prepare(o);
    } catch (const Error&) {
        return 0;
    }
    Tokenizer tokenizer = Tokenizer::load(o.out + "/tokenizer.bin");
    TokenFile(o.out + "/train.bin").check_vocab(tokenizer.vocab_size());
    return 0;
}
