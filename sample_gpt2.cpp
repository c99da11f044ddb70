// sample_gpt2.cpp - writes poems with a trained model. It links train_gpt2.o, which defines open_decoder().
// sample_gpt2.cu includes this file, and defines it for a GPU.
#include "data/prompt.h"
#include "data/verses.h"
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

namespace {

struct Settings {
    std::string checkpoint = "out/model.bin", tokenizer, prompt, tags,
                dtype = DEFAULT_DTYPE == BF16 ? "bf16" : "fp32";
    int tokens = -1, num = 1, threads = 0, device = -1;
    uint64_t seed = 1337;
    bool ignore_end = false, list_tags = false;
    verses::Wish wish;
    SampleOptions sampling;
};

void add_flags(Flags& f, Settings& s) {
    f.add("init_from", "e", &s.checkpoint, "FILE", "the model");
    f.add("tokenizer", "", &s.tokenizer, "FILE",
          "its tokenizer; by default tokenizer.bin in the model's folder");
    f.add("prompt", "p", &s.prompt, "TEXT", "how the poems begin; cleaned as the training poems were");
    f.add("tags", "", &s.tags, "COL=VALUE",
          "what the poems are to be, separated by commas, e.g. poem_meter=\u0637\u0648\u064A\u0644, for a "
          "model that learnt tags");
    f.add("list_tags", "", &s.list_tags, "print the tags that the model knows, a line each, and end");
    f.add("verses", "", &s.wish.verses, "N", "end each poem after N verses (lines); 0: where the model does")
        .range(0, 10000);
    f.add(
        "rhyme", "", &s.wish.rhyme, "R",
        "keep a rhyme: auto: that of the poem's first verse; or the letter, e.g. \u0628, or letters that all "
        "verses end in. Verses are drawn again until they do, except the prompt's; stderr counts the redraws "
        "and names the verses that do not rhyme");
    f.add("tokens", "n", &s.tokens, "N", "longest poem, in tokens; -1: 400, or 200 for each of --verses")
        .range(1, INFINITY)
        .unset(-1);
    f.add("num", "", &s.num, "N", "how many poems; they are written in parallel").range(1, 4096);
    f.add("temperature", "", &s.sampling.temperature, "X",
          "below 1 is safer, above 1 is wilder, 0 always takes the likeliest")
        .range(0, 1e6);
    f.add("top_k", "", &s.sampling.top_k, "K", "choose among the K likeliest tokens; 0: all")
        .range(0, INFINITY);
    f.add("top_p", "", &s.sampling.top_p, "P", "choose among the likeliest that together reach probability P")
        .range(1e-6, 1);
    f.add("repetition_penalty", "", &s.sampling.repetition_penalty, "X",
          "above 1, tokens that the text already has become less likely")
        .range(0.01, 100);
    f.add("ignore_end", "", &s.ignore_end, "do not stop where the model ends the poem");
    f.add("seed", "", &s.seed, "N", "the same seed writes the same poems");
    f.add("dtype", "", &s.dtype, "NAME",
          ON_GPU
              ? "how weights are kept and multiplied: fp32 or bf16, as this program was built"
              : "how weights are kept and multiplied: fp32, or bf16, which is half as large and up to twice "
                "as fast")
        .choices({"fp32", "bf16"});
    if (ON_GPU)
        f.add("device", "", &s.device, "N", "the GPU to use, by nvidia-smi's number; -1: the first of CUDA")
            .range(0, 63)
            .unset(-1);
    else f.add("threads", "", &s.threads, "N", "threads; 0: all cores").range(0, 4096);
    f.epilogue(
        strf("Example:\n  ./%s -e out/model.bin --prompt \"قفا نبك\" --tokens 400 --temperature 0.8 "
             "--top_k 50 --top_p 0.95 --seed 7 --num 3\n",
             PROGRAM));
}

void list_tags(const Tokenizer& tokenizer) {
    for (const std::string& column : tokenizer.tag_columns())
        for (const std::string& value : tokenizer.tag_values(column))
            printf("%s=%s\n", column.c_str(), value.c_str());
}

// --rhyme in letters that the model knows
std::string rhyme_of_flag(const Tokenizer& tokenizer, const std::optional<Recipe>& recipe,
                          const Settings& s) {
    try {
        return verses::rhyme_for(s.wish.rhyme, tokenizer, recipe);
    } catch (const Error& e) {
        throw UsageError(strf("--rhyme: %s", e.what()));
    }
}

// Says on stderr how the wished rhyme was kept.
void report_rhymes(const std::vector<verses::Keeper>& poems) {
    size_t count = 0, redraws = 0, unrhymed = 0;
    for (size_t i = 0; i < poems.size(); i++) {
        count += poems[i].count(), redraws += poems[i].redraws(), unrhymed += poems[i].unrhymed().size();
        for (size_t verse : poems[i].unrhymed())
            fprintf(stderr, "poem %zu, verse %zu: does not rhyme in %s, %s\n", i + 1, verse,
                    poems[i].rhyme().c_str(),
                    verse <= poems[i].given()
                        ? "it is in the prompt, which stays as it is"
                        : strf("none of %d tries did", verses::Keeper::MOST_TRIES + 1).c_str());
    }
    fprintf(stderr, "%zu of %zu verses keep the rhyme; %.2f redraws per verse\n", count - unrhymed, count,
            (double)redraws / (double)std::max<size_t>(count, 1));
}

// Prints s.num poems: the first as it is written, the others once all are finished.
void write_poems(ModelReader& reader, const Tokenizer& tokenizer, const Settings& s, const Prompt& start) {
    SampleOptions sampling = s.sampling;
    sampling.below = tokenizer.first_tag(), sampling.prefix = start.tags();
    auto decoder = open_decoder(reader, (size_t)s.num, s.dtype == "bf16" ? BF16 : FP32);
    std::vector<verses::Keeper> keepers;
    keepers.reserve((size_t)s.num);
    std::vector<Steering*> steering;
    for (int i = 0; (s.wish.verses || !s.wish.rhyme.empty()) && i < s.num; i++) {
        keepers.emplace_back(tokenizer, s.wish, start.tokens, 1 + start.tag_count);
        steering.push_back(&keepers.back());
    }
    std::vector<std::string> rest((size_t)s.num);
    Utf8Stream stream;
    auto title = [&](int i) {
        if (s.num > 1) printf("%s--- %d ---\n", i ? "\n\n" : "", i + 1);
        fputs(start.text.c_str(), stdout);
    };
    title(0);
    fflush(stdout);
    const int most = s.tokens > 0 ? s.tokens : s.wish.verses ? 200 * s.wish.verses : 400;
    generate(
        *decoder, (size_t)s.num, start.tokens, reader.cfg.V, s.ignore_end ? -1 : tokenizer.eot(), most,
        s.seed, sampling,
        [&](size_t i, int token) {
            std::string text = token == tokenizer.eot() ? "\n\n" : tokenizer.bytes(token);
            if (i) rest[i] += text;
            else fputs(stream.feed(text).c_str(), stdout), fflush(stdout);
        },
        steering);
    for (int i = 1; i < s.num; i++) title(i), fputs(Utf8Stream().feed(rest[(size_t)i]).c_str(), stdout);
    printf("\n");
    if (!s.wish.rhyme.empty()) report_rhymes(keepers);
}

}  // namespace

int main(int argc, char** argv) {
    machine::spin_less(argv);
    machine::flush_subnormals();
    return run_main(PROGRAM, [&]() -> int {
        Settings s;
        const std::string built_dtype = s.dtype;
        Flags f(PROGRAM,
                ON_GPU ? "writes poems from a checkpoint, on a GPU" : "writes poems from a checkpoint");
        add_flags(f, s);
        f.parse(argc, argv);
        if (s.threads) machine::set_threads(s.threads);
        if (ON_GPU && s.dtype != built_dtype)
            throw UsageError(
                strf("--dtype: this program computes in %s; the other is built by: "
                     "make sample_gpt2cu PRECISION=%s",
                     built_dtype.c_str(), DEFAULT_DTYPE == BF16 ? "FP32" : "BF16"));
        if (s.wish.verses && s.ignore_end)
            throw UsageError("--verses and --ignore_end: give only one of them, both say where poems end");
        take_gpu(s.device);

        ModelReader reader(s.checkpoint);
        if (s.tokenizer.empty()) s.tokenizer = tokenizer_beside(s.checkpoint);
        const Tokenizer tokenizer = tokenizer_for(s.checkpoint, reader.cfg.V, s.tokenizer);
        if (s.list_tags) {
            list_tags(tokenizer);
            return 0;
        }
        const std::optional<Recipe> recipe = recipe_for(s.tokenizer);
        const Prompt start =
            prompt_of_flags(tokenizer, recipe, s.prompt, "--tags", s.tags, (size_t)reader.cfg.maxT);
        s.wish.rhyme = rhyme_of_flag(tokenizer, recipe, s);
        write_poems(reader, tokenizer, s, start);
        return 0;
    });
}
