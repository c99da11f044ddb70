// tokenize.cpp - turns text into tokens and back, on the command line.
//
//     ./tokenize gpt2.bin < poem.txt > ids.txt           one token per line
//     ./tokenize gpt2.bin --decode < ids.txt > poem.txt
//
// --framed is for programs that encode many texts at once (check_tokenizer.py). Each text on standard input
// is a uint32 length and that many bytes; its output is a uint32 count and that many uint32 tokens.
#include <ctime>
#include <string>
#include <vector>

#include "lib/flags.h"
#include "lib/io.h"
#include "tokenizer/tokenizer.h"

namespace tokenize {

inline void print(const std::string& s) {
    if (fwrite(s.data(), 1, s.size(), stdout) != s.size())
        fail("cannot write the output: %s", strerror(errno));
}

inline std::string read_all(FILE* f) {
    std::string s;
    char part[1 << 16];
    for (size_t n; (n = fread(part, 1, sizeof part, f)) > 0;) s.append(part, n);
    if (ferror(f)) fail("cannot read the input: %s", strerror(errno));
    return s;
}

inline std::vector<int> read_ids(const std::string& text) {
    constexpr const char* WHITE = " \t\r\n";
    std::vector<int> ids;
    for (size_t i = 0, end; (i = text.find_first_not_of(WHITE, i)) != std::string::npos; i = end) {
        end = std::min(text.find_first_of(WHITE, i), text.size());
        char* stop;
        long id = strtol(&text[i], &stop, 10);
        if (stop != &text[0] + end || id < INT32_MIN || id > INT32_MAX)
            fail("%s is not a token", utf8::quote(std::string_view(text).substr(i, end - i)).c_str());
        ids.push_back((int)id);
    }
    return ids;
}

inline std::vector<std::string_view> read_frames(std::string_view input) {
    std::vector<std::string_view> texts;
    for (size_t i = 0, end; i < input.size(); i = end) {
        uint32_t length = 0;
        if (input.size() - i >= 4) memcpy(&length, &input[i], 4);
        if (input.size() - i < 4 || length > input.size() - i - 4)
            fail("the text at byte %zu is truncated", i);
        end = i + 4 + length;
        texts.push_back(input.substr(i + 4, length));
    }
    return texts;
}

inline int tokenize_main(int argc, char** argv) {
    std::vector<std::string> files;
    bool decode = false, framed = false;
    int time = 0;
    Flags f("tokenize", "turns the text on standard input into tokens");
    f.positional(&files, "tokenizer.bin < text");
    f.add("decode", "", &decode, "turn tokens into text");
    f.add("framed", "", &framed, "many texts in a binary format, which tokenize.cpp describes");
    f.add("time", "", &time, "N",
          "encode the texts N times, each time with a fresh tokenizer; print the CPU seconds")
        .range(0, INFINITY);
    f.parse(argc, argv);
    if (files.size() != 1)
        throw UsageError("wanted one tokenizer: ./tokenize tokenizer.bin < text; see --help");

    Tokenizer tok = Tokenizer::load(files[0]);
    const std::string input = read_all(stdin);
    if (decode) {
        print(tok.decode(read_ids(input)));
        return 0;
    }
    const std::vector<std::string_view> texts =
        framed ? read_frames(input) : std::vector<std::string_view>{input};
    for (int i = 0; i < time; i++) {
        Tokenizer fresh = Tokenizer::load(files[0]);
        size_t tokens = 0;
        clock_t start = clock();
        for (std::string_view text : texts) tokens += fresh.encode(text).size();
        printf("%.6f s, %zu tokens\n", (double)(clock() - start) / CLOCKS_PER_SEC, tokens);
    }
    if (time) return 0;
    for (std::string_view text : texts) {
        std::vector<int> ids = tok.encode(text);
        std::string out;
        if (framed) {
            uint32_t count = (uint32_t)ids.size();
            out.append((const char*)&count, 4).append((const char*)ids.data(), 4 * ids.size());
        } else {
            for (int id : ids) out += std::to_string(id) + "\n";
        }
        print(out);
    }
    return 0;
}

}  // namespace tokenize

#ifndef ARAPOET_NO_MAIN
int main(int argc, char** argv) {
    return run_main("tokenize", [&] { return tokenize::tokenize_main(argc, argv); });
}
#endif
