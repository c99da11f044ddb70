// sample_gpt2.cpp - writes poems with a trained model. It links train_gpt2.o, which defines open_decoder().
// sample_gpt2.cu includes this file, and defines it for a GPU.
#include "data/prompt.h"
#include "lib/flags.h"
#include "lib/machine.h"
#include "lib/sampler.h"
#include "tokenizer/tokenizer.h"

#ifdef SAMPLE_ON_GPU
constexpr bool ON_GPU = true;
constexpr const char* PROGRAM = "sample_gpt2cu";
constexpr Dtype DEFAULT_DTYPE = gpu::BUILD_DTYPE;  // and the only one
#else
constexpr bool ON_GPU = false;
constexpr const char* PROGRAM = "sample_gpt2";
constexpr Dtype DEFAULT_DTYPE = FP32;
void take_gpu(int) {}
#endif

int main(int argc, char** argv) {
    machine::spin_less(argv);
    return run_main(PROGRAM, [&]() -> int {
        const std::string default_dtype = DEFAULT_DTYPE == BF16 ? "bf16" : "fp32";
        std::string checkpoint = "out/model.bin", tokenizer_path, prompt, tags, dtype = default_dtype;
        int tokens = 400, num = 1, threads = 0, device = -1;
        uint64_t seed = 1337;
        bool ignore_end = false, list_tags = false;
        SampleOptions so;
        Flags f(PROGRAM,
                ON_GPU ? "writes poems from a checkpoint, on a GPU" : "writes poems from a checkpoint");
        f.add("init_from", "e", &checkpoint, "FILE", "the model");
        f.add("tokenizer", "", &tokenizer_path, "FILE",
              "its tokenizer; by default tokenizer.bin in the model's folder");
        f.add("prompt", "p", &prompt, "TEXT", "how the poems begin; cleaned as the training poems were");
        f.add(
            "tags", "", &tags, "COL=VALUE",
            "what the poems are to be, separated by commas, e.g. poem_meter=\u0637\u0648\u064A\u0644, for a "
            "model that learnt tags");
        f.add("list_tags", "", &list_tags, "print the tags that the model knows, a line each, and end");
        f.add("tokens", "n", &tokens, "N", "longest poem, in tokens").range(1, INFINITY);
        f.add("num", "", &num, "N", "how many poems; they are written in parallel").range(1, 4096);
        f.add("temperature", "", &so.temperature, "X",
              "below 1 is safer, above 1 is wilder, 0 always takes the likeliest")
            .range(0, 1e6);
        f.add("top_k", "", &so.top_k, "K", "choose among the K likeliest tokens; 0: all").range(0, INFINITY);
        f.add("top_p", "", &so.top_p, "P", "choose among the likeliest that together reach probability P")
            .range(1e-6, 1);
        f.add("repetition_penalty", "", &so.repetition_penalty, "X",
              "above 1, tokens that the text already has become less likely")
            .range(0.01, 100);
        f.add("ignore_end", "", &ignore_end, "do not stop where the model ends the poem");
        f.add("seed", "", &seed, "N", "the same seed writes the same poems");
        f.add("dtype", "", &dtype, "NAME",
              ON_GPU ? "how weights are kept and multiplied: fp32 or bf16, as this program was built"
                     : "how weights are kept and multiplied: fp32, or bf16, which is half as large and up to "
                       "twice as fast")
            .choices({"fp32", "bf16"});
        if (ON_GPU)
            f.add("device", "", &device, "N", "the GPU to use, by nvidia-smi's number; -1: the first of CUDA")
                .range(0, 63)
                .unset(-1);
        else f.add("threads", "", &threads, "N", "threads; 0: all cores").range(0, 4096);
        f.epilogue(
            strf("Example:\n  ./%s -e out/model.bin --prompt \"قفا نبك\" --tokens 400 --temperature 0.8 "
                 "--top_k 50 --top_p 0.95 --seed 7 --num 3\n",
                 PROGRAM));
        f.parse(argc, argv);
        if (threads) machine::set_threads(threads);
        if (ON_GPU && dtype != default_dtype)
            throw UsageError(
                strf("--dtype: this program computes in %s; the other is built by: "
                     "make sample_gpt2cu PRECISION=%s",
                     default_dtype.c_str(), DEFAULT_DTYPE == BF16 ? "FP32" : "BF16"));
        take_gpu(device);

        ModelReader reader(checkpoint);
        if (tokenizer_path.empty()) tokenizer_path = dirname_of(checkpoint) + "/tokenizer.bin";
        if (!file_exists(tokenizer_path))
            fail("%s: tokenizer not found; name it with --tokenizer FILE", tokenizer_path.c_str());
        Tokenizer tokenizer = Tokenizer::load(tokenizer_path);
        if (tokenizer.vocab_size() != reader.cfg.V)
            fail("%s: has %d tokens, %s has a vocabulary of %d", tokenizer_path.c_str(),
                 tokenizer.vocab_size(), checkpoint.c_str(), reader.cfg.V);
        if (list_tags) {
            for (const std::string& column : tokenizer.tag_columns())
                for (const std::string& value : tokenizer.tag_values(column))
                    printf("%s=%s\n", column.c_str(), value.c_str());
            return 0;
        }
        size_t before;  // tokens that begin a poem before its text
        try {
            before = tokenizer.beginning(tags).size();
        } catch (const Error& e) {
            throw UsageError(strf("--tags: %s", e.what()));
        }
        Prompt start;
        try {
            start = make_prompt(tokenizer, tokenizer_path, prompt, tags);
        } catch (const Error& e) {
            throw UsageError(strf("--prompt: %s", e.what()));
        }
        if (start.tokens.size() > (size_t)reader.cfg.maxT)
            throw UsageError(strf("--prompt has %zu tokens, %s takes at most %d after the %s a poem",
                                  start.tokens.size() - before, checkpoint.c_str(),
                                  reader.cfg.maxT - (int)before,
                                  before == 1 ? "one that begins" : strf("%zu that begin", before).c_str()));
        so.below = tokenizer.first_tag(), so.keep = start.tags();

        auto decoder = open_decoder(reader, (size_t)num, dtype == "bf16" ? BF16 : FP32);
        // The first poem is printed as it is written; the others once all are finished.
        std::vector<std::string> rest((size_t)num);
        Utf8Stream stream;
        auto title = [&](int i) {
            if (num > 1) printf("%s--- %d ---\n", i ? "\n\n" : "", i + 1);
            fputs(start.text.c_str(), stdout);
        };
        title(0);
        fflush(stdout);
        generate(*decoder, (size_t)num, start.tokens, reader.cfg.V, ignore_end ? -1 : tokenizer.eot(), tokens,
                 seed, so, [&](size_t s, int token) {
                     std::string text = token == tokenizer.eot() ? "\n\n" : tokenizer.bytes(token);
                     if (s) rest[s] += text;
                     else fputs(stream.feed(text).c_str(), stdout), fflush(stdout);
                 });
        for (int i = 1; i < num; i++) title(i), fputs(Utf8Stream().feed(rest[(size_t)i]).c_str(), stdout);
        printf("\n");
        return 0;
    });
}
