// sample_gpt2.cpp - writes poems with a trained model. It links train_gpt2.o, which defines open_decoder().
#include "lib/flags.h"
#include "lib/machine.h"
#include "lib/sampler.h"
#include "tokenizer/tokenizer.h"

int main(int argc, char** argv) {
    machine::spin_less(argv);
    return run_main("sample_gpt2", [&]() -> int {
        std::string checkpoint = "out/model.bin", tokenizer_path, prompt, dtype = "fp32";
        int tokens = 400, num = 1, threads = 0;
        uint64_t seed = 1337;
        bool ignore_end = false;
        SampleOptions so;
        Flags f("sample_gpt2", "writes poems from a checkpoint");
        f.add("init_from", "e", &checkpoint, "FILE", "the model");
        f.add("tokenizer", "", &tokenizer_path, "FILE",
              "its tokenizer; by default tokenizer.bin in the model's folder");
        f.add("prompt", "p", &prompt, "TEXT", "how the poems begin");
        f.add("tokens", "n", &tokens, "N", "longest poem, in tokens").range(1, INFINITY);
        f.add("num", "", &num, "N", "how many poems; they are written in parallel").range(1, 4096);
        f.add("temperature", "", &so.temperature, "X",
              "below 1 is safer, above 1 is wilder, 0 always takes the likeliest")
            .range(0, 1e6);
        f.add("top_k", "", &so.top_k, "K", "choose among the K likeliest tokens; 0: all").range(0, INFINITY);
        f.add("top_p", "", &so.top_p, "P", "choose among the likeliest that together reach probability P")
            .range(1e-6, 1);
        f.add("ignore_end", "", &ignore_end, "do not stop where the model ends the poem");
        f.add("seed", "", &seed, "N", "the same seed writes the same poems");
        f.add("dtype", "", &dtype, "NAME",
              "how weights are kept and multiplied: fp32, or bf16, which is half as large and up to twice as "
              "fast")
            .choices({"fp32", "bf16"});
        f.add("threads", "", &threads, "N", "threads; 0: all cores").range(0, 4096);
        f.epilogue(
            "Example:\n  ./sample_gpt2 -e out/model.bin --prompt \"قفا نبك\" --tokens 400 --temperature 0.8 "
            "--top_k 50 --top_p 0.95 --seed 7 --num 3\n");
        f.parse(argc, argv);
        if (threads) machine::set_threads(threads);

        ModelReader reader(checkpoint);
        if (tokenizer_path.empty()) tokenizer_path = dirname_of(checkpoint) + "/tokenizer.bin";
        if (!file_exists(tokenizer_path))
            fail("%s: tokenizer not found; name it with --tokenizer FILE", tokenizer_path.c_str());
        Tokenizer tokenizer = Tokenizer::load(tokenizer_path);
        if (tokenizer.vocab_size() != reader.cfg.V)
            fail("%s: has %d tokens, %s has a vocabulary of %d", tokenizer_path.c_str(),
                 tokenizer.vocab_size(), checkpoint.c_str(), reader.cfg.V);
        std::vector<int> start = {tokenizer.eot()};
        try {
            for (int t : tokenizer.encode(prompt)) start.push_back(t);
        } catch (const Error& e) {
            throw UsageError(strf("--prompt: %s", e.what()));
        }
        if (start.size() > (size_t)reader.cfg.maxT)
            throw UsageError(
                strf("--prompt has %zu tokens, %s takes at most %d after the one that begins a poem",
                     start.size() - 1, checkpoint.c_str(), reader.cfg.maxT - 1));

        auto decoder = open_decoder(reader, (size_t)num, dtype == "bf16" ? BF16 : FP32);
        // The first poem is printed as it is written; the others once all are finished.
        std::vector<std::string> rest((size_t)num);
        Utf8Stream stream;
        auto title = [&](int i) {
            if (num > 1) printf("%s--- %d ---\n", i ? "\n\n" : "", i + 1);
            fputs(prompt.c_str(), stdout);
        };
        title(0);
        fflush(stdout);
        generate(*decoder, (size_t)num, start, reader.cfg.V, ignore_end ? -1 : tokenizer.eot(), tokens, seed,
                 so, [&](size_t s, int token) {
                     std::string text = token == tokenizer.eot() ? "\n\n" : tokenizer.bytes(token);
                     if (s) rest[s] += text;
                     else fputs(stream.feed(text).c_str(), stdout), fflush(stdout);
                 });
        for (int i = 1; i < num; i++) title(i), fputs(Utf8Stream().feed(rest[(size_t)i]).c_str(), stdout);
        printf("\n");
        return 0;
    });
}
