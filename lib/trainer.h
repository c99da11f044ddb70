// trainer.h - what the CPU and the GPU trainer share: flags, schedule, training loop, log, checkpoints,
// resume. A model is anything that satisfies lib/model.h.
//
// A run's folder (--out) holds
//     model.bin                     the best model by validation loss: what sample_gpt2 reads
//     tokenizer.bin                 a copy, so that the folder is complete
//     model_00000500.bin,           the model after 500 steps, and what else --resume needs
//     state_00000500.bin            (lib/checkpoint.h); the last --keep pairs are kept
//     main.log, log.csv             the losses, in llm.c's form and as a table
//     data/                         what the run was trained on, where `make train` has prepared it
//     previous/N/                   earlier runs and models that were replaced (lib/run_folder.h)
#pragma once

#include <csignal>
#include <chrono>
#include <filesystem>
#include <sys/ioctl.h>
#include <memory>
#include <sstream>

#include "data/dataloader.h"
#include "data/prompt.h"
#include "lib/checkpoint.h"
#include "lib/flags.h"
#include "lib/gpt2.h"
#include "lib/machine.h"
#include "lib/model.h"
#include "lib/sampler.h"
#include "tokenizer/tokenizer.h"

namespace trainer {

// ---------------------------------------------------------------------------------------------
// Settings

constexpr int MOST_STEPS = 99999999;  // files are numbered with eight digits

struct Options {
    // data
    std::string data = "out/data", train_data, val_data, tokenizer;
    // model. In its flags 0, -1 and "" mean: as the preset or the checkpoint says; for the others see their
    // help
    std::string init_from, preset = "tiny";
    std::string activation;
    int depth = 0, heads = 0, channels = 0, seq_len = 0;
    float dropout = -1;
    // optimisation
    int batch_size = 0, total_batch_size = 0, max_steps = -1, warmup_steps = -1, patience = 0;
    float epochs = 0;
    bool shuffle = true;
    float learning_rate = 0, final_lr_fraction = -1, weight_decay = 0.1f, beta1 = 0.9f, beta2 = 0.95f,
          eps = 1e-8f, grad_clip = 1, skip_loss_z = 0, skip_norm_z = 0;
    std::string lr_schedule, optimizer;
    float muon_learning_rate = 0;
    uint64_t seed = 1337;
    int threads = 0, recompute = 0;
    std::string dtype;
    bool master_weights = true, deterministic = false;
    // several ranks
    int device = -1, gpus = 1, zero_stage = 0, rank_timeout = 60;
    // watching
    int val_every = -1, val_tokens = 100000, val_batches = -1, sample_every = -1, sample_tokens = 200,
        log_every = 1;
    float temperature = 0.8f;
    std::string prompt, prompt_tags;
    // keeping
    std::string out = "out";
    int save_every = -1, keep = 2;
    bool resume = false, overwrite = false;
};

constexpr double MOST = INFINITY;  // the limit of a flag that has none
inline void add_data_and_model_flags(Flags& f, Options& o) {
    f.section("Data");
    f.add("data", "", &o.data, "DIR", "folder made by ./prepare_data: train.bin, val.bin, tokenizer.bin");
    f.add("train_data", "i", &o.train_data, "FILE",
          "training tokens, instead of DIR/train.bin; 'DIR/train_*.bin' takes many files, in name order");
    f.add("shuffle", "", &o.shuffle, "draw the windows of an epoch in random order; 0: in file order");
    f.add("val_data", "j", &o.val_data, "FILE", "validation tokens, instead of DIR/val.bin");
    f.add("tokenizer", "", &o.tokenizer, "FILE", "tokenizer, instead of DIR/tokenizer.bin");
    f.section("Model");
    f.add("init_from", "e", &o.init_from, "FILE",
          "start from this checkpoint; d6, d12, d24, d36, d48: random weights of GPT-2 with as many layers")
        .on_resume(Flags::NOT_KEPT);
    f.add("preset", "", &o.preset, "NAME", "sizes and defaults")
        .choices(preset_names())
        .on_resume(Flags::FIXED);
    f.add("depth", "", &o.depth, "L", "layers, instead of the preset's")
        .range(1, 4096)
        .unset(0)
        .on_resume(Flags::FIXED);
    f.add("heads", "", &o.heads, "NH", "attention heads, instead of the preset's")
        .range(1, 4096)
        .unset(0)
        .on_resume(Flags::FIXED);
    f.add("channels", "", &o.channels, "C", "width, instead of the preset's; a multiple of the heads")
        .range(1, 1 << 17)
        .unset(0)
        .on_resume(Flags::FIXED);
    f.add("seq_len", "t", &o.seq_len, "T", "tokens of context; 0: the preset's")
        .range(1, 1 << 20)
        .unset(0)
        .on_resume(Flags::FIXED);
    f.add("activation", "", &o.activation, "NAME", "GPT-2's GELU (tanh), or the exact one (erf)")
        .choices({"gelu_new", "gelu"})
        .on_resume(Flags::FIXED);
    f.add("dropout", "", &o.dropout, "P", "share of activations dropped in training; -1: the preset's")
        .range(0, 0.99)
        .unset(-1);
}
inline void add_optimisation_flags(Flags& f, Options& o) {
    f.section("Optimisation");
    f.add("batch_size", "b", &o.batch_size, "B", "sequences at once, of each rank; 0: the preset's")
        .range(1, 1 << 24)
        .unset(0);
    f.add("total_batch_size", "d", &o.total_batch_size, "N",
          "tokens per step of all ranks, accumulated over batches of B*T; 0: a batch of each")
        .range(0, MOST);
    f.add("max_steps", "x", &o.max_steps, "N", "steps to train; 0 only evaluates; -1: the preset's")
        .range(0, MOST_STEPS)
        .unset(-1);
    f.add("epochs", "", &o.epochs, "E",
          "passes over the training tokens, instead of --max_steps; 0: --max_steps")
        .range(0, 1e9);
    f.add("patience", "", &o.patience, "N",
          "end after N validations without a better one; 0: never before --max_steps")
        .range(0, MOST);
    f.add("optimizer", "", &o.optimizer, "NAME",
          "muon: for the blocks' matrices, adamw for the rest; \"\": muon for models of up to 512 channels, "
          "or up to 128 when fine-tuning")
        .choices({"adamw", "muon"});
    f.add("learning_rate", "l", &o.learning_rate, "LR", "peak learning rate; 0: the preset's").range(0, 1e3);
    f.add("muon_learning_rate", "", &o.muon_learning_rate, "LR",
          "Muon's peak learning rate; 0: 5 times --learning_rate")
        .range(0, 1e3);
    f.add("lr_schedule", "k", &o.lr_schedule, "NAME",
          "how the learning rate falls; wsd: constant, then a fast decay")
        .choices({"constant", "cosine", "linear", "wsd"});
    f.add("warmup_steps", "u", &o.warmup_steps, "N",
          "steps over which the learning rate rises from 0; -1: 5% of all, fine-tuning none")
        .range(0, MOST)
        .unset(-1);
    f.add("final_lr_fraction", "q", &o.final_lr_fraction, "F",
          "where the schedule ends, as a share of the peak; -1: 0.1")
        .range(0, 1)
        .unset(-1);
    f.add("weight_decay", "c", &o.weight_decay, "W",
          "decay of matrices and embeddings, times their learning rate")
        .range(0, 1e3);
    f.add("beta1", "", &o.beta1, "X", "AdamW's beta1").range(0, 0.99999);
    f.add("beta2", "", &o.beta2, "X", "AdamW's beta2").range(0, 0.999999);
    f.add("eps", "", &o.eps, "X", "AdamW's epsilon").range(1e-12, 1);
    f.add("grad_clip", "", &o.grad_clip, "X", "largest global norm of the gradient; 0: no limit")
        .range(0, 1e30);
    f.add("skip_loss_z", "sl", &o.skip_loss_z, "Z",
          "skip a step whose loss is Z standard deviations above the mean of the last 128; 0: never")
        .range(0, 11);  // a value among 128 is never more than sqrt(127) from their mean
    f.add("skip_norm_z", "sg", &o.skip_norm_z, "Z", "the same for the gradient's norm").range(0, 11);
    f.add("seed", "", &o.seed, "N", "weights, shuffling, dropout and samples follow from it");
    f.add("threads", "", &o.threads, "N", "threads of the CPU; 0: all cores")
        .range(0, 4096)
        .on_resume(Flags::NOT_KEPT);
    f.add("recompute", "r", &o.recompute, "N",
          "to save memory backward recomputes: 1 GELU, 2 also LayerNorm, 3 whole blocks")
        .range(0, 3);
    f.add("dtype", "", &o.dtype, "NAME", "numbers to compute with: fp32 or bf16; \"\": this trainer's own");
    f.add("master_weights", "w", &o.master_weights,
          "with bf16 also keep the weights in fp32; 0 saves memory (GPU)");
    f.add("deterministic", "", &o.deterministic,
          "choose each matrix product's algorithm by a rule, not by timing (GPU)");
}
inline void add_rank_flags(Flags& f, Options& o) {
    f.section("GPUs");
    f.add("device", "", &o.device, "N", "the GPU to use, by nvidia-smi's number; -1: the first of CUDA")
        .range(0, 63)
        .unset(-1)
        .on_resume(Flags::NOT_KEPT);
    f.add("gpus", "", &o.gpus, "N",
          "GPUs of this machine, a process each; srun, torchrun, mpirun start them too")
        .range(1, 64)
        .on_resume(Flags::NOT_KEPT);
    f.add("zero_stage", "z", &o.zero_stage, "N",
          "what each GPU keeps only its share of: 0 nothing, 1 the optimizer's state, 2 also the gradients")
        .range(0, 2);
    f.add("rank_timeout", "", &o.rank_timeout, "S", "seconds after which a silent rank counts as dead (GPU)")
        .range(1, 86400)
        .on_resume(Flags::NOT_KEPT);  // the ranks connect before the run's settings are read
}
inline void add_output_flags(Flags& f, Options& o) {
    f.section("Watching");
    f.add("val_every", "v", &o.val_every, "N", "steps between validations; 0: never; -1: 20 times a run")
        .range(0, MOST)
        .unset(-1);
    f.add("val_tokens", "", &o.val_tokens, "N",
          "tokens that a validation predicts, from the file's start; 0: the whole file")
        .range(0, MOST);
    f.add("val_batches", "m", &o.val_batches, "N", "the same in batches of B x T tokens; -1: --val_tokens")
        .range(0, MOST)
        .unset(-1);
    f.add("sample_every", "s", &o.sample_every, "N",
          "steps between sample poems; 0: never; -1: 4 times a run")
        .range(0, MOST)
        .unset(-1);
    f.add("sample_tokens", "g", &o.sample_tokens, "N", "length of a sample poem").range(1, 1 << 24);
    f.add("temperature", "", &o.temperature, "X", "of the sample poems: lower is safer, higher is wilder")
        .range(0, 1e6);
    f.add("prompt", "", &o.prompt, "TEXT", "how the sample poems begin");
    f.add("prompt_tags", "", &o.prompt_tags, "COL=VALUE",
          "their tags, separated by commas, where the data have tags (./prepare_data --tags)");
    f.add("log_every", "lg", &o.log_every, "N", "steps between lines where the output is no terminal")
        .range(1, MOST);
    f.section("Keeping");
    f.add("out", "o", &o.out, "DIR", "folder for the model, checkpoints and logs").on_resume(Flags::NOT_KEPT);
    f.add("save_every", "n", &o.save_every, "N",
          "steps between checkpoints; 0: only at the end; -1: 4 times a run")
        .range(0, MOST)
        .unset(-1);
    f.add("keep", "nk", &o.keep, "N", "checkpoints to keep, beside the best model").range(1, 1 << 20);
    f.add("resume", "y", &o.resume, "go on from the last checkpoint in --out, with its settings")
        .on_resume(Flags::NOT_KEPT);
    f.add("overwrite", "", &o.overwrite,
          "start anew in a folder that holds a run, which moves to DIR/previous")
        .on_resume(Flags::NOT_KEPT);
}
inline void add_flags(Flags& f, Options& o, const std::string& program) {
    add_data_and_model_flags(f, o), add_optimisation_flags(f, o), add_rank_flags(f, o),
        add_output_flags(f, o);
    f.epilogue(
        "Examples:\n"
        "  ./prepare_data poems.csv -o data/poems && ./" +
        program +
        " --data data/poems --preset char -o out/poems\n"
        "  ./" +
        program +
        " -o out/poems --resume                      goes on where it stopped\n"
        "  ./" +
        program +
        " -e out/poems/model.bin --data data/poems --max_steps 0     only evaluates\n"
        "  ./sample_gpt2 -e out/poems/model.bin --prompt \"قفا نبك\"\n");
}

inline Optimizer optimizer_of(const Options& o) { return o.optimizer == name_of(MUON) ? MUON : ADAMW; }

// Defaults that depend on the model's size: the optimizer that was the best where they were compared, and a
// rate near its best (dev/ladder/OPTIMIZERS.md). Models from 129 channels on are fine-tuned with the settings
// usual for GPT-2: by AdamW, with a low, constant learning rate.
inline void apply_preset_defaults(Options& o, const Config& c, bool fine_tune) {
    const bool small = c.C <= 128, middle = c.C <= 512;
    if (o.optimizer.empty()) o.optimizer = name_of(small || (middle && !fine_tune) ? MUON : ADAMW);
    struct Defaults {
        int batch_size, max_steps;
        float learning_rate;
        const char* schedule;
        float dropout;
    };
    const bool muon = optimizer_of(o) == MUON;
    const Defaults d = small && fine_tune    ? Defaults{16, 300, 1e-3f, "cosine", 0}
                       : small && muon       ? Defaults{16, 300, 4e-3f, "cosine", 0.1f}
                       : small               ? Defaults{16, 700, 2e-3f, "cosine", 0.1f}
                       : middle && fine_tune ? Defaults{32, 1000, 3e-5f, "constant", 0}
                       : middle              ? Defaults{32, 5000, 1e-3f, "cosine", 0.2f}
                       : fine_tune           ? Defaults{4, 1000, 3e-5f, "constant", 0}
                                             : Defaults{4, 5000, 3e-4f, "cosine", 0};
    if (!o.batch_size) o.batch_size = d.batch_size;
    if (o.max_steps < 0) o.max_steps = d.max_steps;
    if (o.learning_rate == 0) o.learning_rate = d.learning_rate;
    if (o.lr_schedule.empty()) o.lr_schedule = d.schedule;
    if (o.dropout < 0) o.dropout = d.dropout;
    if (o.final_lr_fraction < 0) o.final_lr_fraction = 0.1f;
    if (o.warmup_steps < 0) o.warmup_steps = fine_tune ? 0 : o.max_steps / 20;
    if (o.val_every < 0) o.val_every = std::max(1, o.max_steps / 20);
    if (o.sample_every < 0) o.sample_every = std::max(1, o.max_steps / 4);
    if (o.save_every < 0) o.save_every = std::max(1, o.max_steps / 4);
}

// The learning rate of step `step` (from 0): linear warm-up, then the schedule down to final_fraction * peak.
// wsd holds the peak for 80% of the run and then falls as 1 - sqrt (Hägele et al. 2024).
inline double learning_rate(const std::string& schedule, double peak, int step, int warmup, int max_steps,
                            double final_fraction) {
    if (step < warmup) return peak * (step + 1) / warmup;
    double done = max_steps > warmup ? (double)(step - warmup) / (max_steps - warmup) : 1,
           floor = peak * final_fraction;
    done = std::min(done, 1.0);
    if (schedule == "constant") return peak;
    if (schedule == "cosine") return floor + (peak - floor) * 0.5 * (1 + std::cos(M_PI * done));
    if (schedule == "linear") return peak + (floor - peak) * done;
    if (schedule == "wsd") {
        double start = 0.8 * max_steps;
        if (step < start) return peak;
        return floor + (peak - floor) * (1 - std::sqrt(std::min(1.0, (step - start) / (max_steps - start))));
    }
    throw UsageError(
        strf("--lr_schedule: '%s' is unknown; known are constant, cosine, linear, wsd", schedule.c_str()));
}

// ---------------------------------------------------------------------------------------------
// Small parts of the loop

inline volatile sig_atomic_t g_stop = 0;       // the signal that asked for an end
inline volatile sig_atomic_t g_continued = 0;  // the process was stopped (Ctrl-Z) and goes on
inline volatile sig_atomic_t g_stop_time = 0;  // when this process's own first signal came
// A second signal ends the program at once, unless it comes within 2 seconds: under make, Ctrl-C reaches the
// program twice, from the terminal and from make. (g_stop may also be another rank's, and counts for nothing
// here: a launcher signals all ranks, one a little after the other.)
inline void on_stop(int s) {
    const sig_atomic_t time_now = (sig_atomic_t)time(nullptr);
    if (g_stop_time && time_now - g_stop_time >= 2) signal(s, SIG_DFL), raise(s);
    if (!g_stop_time) g_stop_time = time_now;
    g_stop = s;
}
inline void on_continue(int) { g_continued = 1; }

// While it exists, SIGINT, SIGTERM, SIGHUP and SIGUSR1 (which Slurm sends before a time limit) end training
// after the current step; SIGINT, SIGTERM and SIGHUP only if they were not ignored from the start (nohup).
class Signals {
  public:
    Signals() {
        g_stop = g_continued = g_stop_time = 0;
        set(SIGCONT, on_continue);
        for (int s : {SIGINT, SIGTERM, SIGHUP, SIGUSR1}) set(s, on_stop);
    }
    ~Signals() {
        for (auto& [s, handler] : before_) signal(s, handler);
    }

  private:
    void set(int s, void (*handler)(int)) {
        auto before = signal(s, handler);
        if (before == SIG_IGN) signal(s, before);
        before_.push_back({s, before});
    }
    std::vector<std::pair<int, void (*)(int)>> before_;
};
inline const char* signal_name(int s) {
    return s == SIGINT ? "Ctrl-C" : s == SIGHUP ? "SIGHUP" : s == SIGUSR1 ? "SIGUSR1" : "SIGTERM";
}

inline double now() {
    return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

// 3725 seconds -> "1:02:05".
inline std::string clock_text(double s) {
    long t = (long)(s + 0.5);
    return t >= 3600 ? strf("%ld:%02ld:%02ld", t / 3600, t / 60 % 60, t % 60)
                     : strf("%ld:%02ld", t / 60, t % 60);
}

// A log file that is appended to line by line; on resume, lines of later steps go. Throws when the disk is
// full.
class LogFile {
  public:
    // keep(line) says which lines of an existing file stay; null: none.
    LogFile(const std::string& path, const std::string& header,
            const std::function<bool(const std::string&)>& keep)
        : path_(path) {
        std::string text = header;
        if (keep && file_exists(path)) {
            Reader r(path);
            std::string old = r.rest();
            for (size_t i = 0, end; i < old.size(); i = end + 1) {
                end = std::min(old.find('\n', i), old.size());
                std::string line = old.substr(i, end - i);
                if (end < old.size() && keep(line)) text += line + "\n";
            }
        }
        AtomicFile out(path);
        out.write(text);
        out.commit();
        file_ = fopen(path.c_str(), "a");
        if (!file_) fail("%s: cannot write: %s", path.c_str(), strerror(errno));
    }
    ~LogFile() {
        if (file_) fclose(file_);
    }
    LogFile(const LogFile&) = delete;
    LogFile& operator=(const LogFile&) = delete;
    // The file has moved; it stays open.
    void moved(const std::string& path) { path_ = path; }
    struct Full : Error {
        using Error::Error;
    };
    void line(const std::string& s) {
        if (fprintf(file_, "%s\n", s.c_str()) < 0 || fflush(file_))
            throw Full(strf("%s: cannot write: %s", path_.c_str(), strerror(errno)));
    }

  private:
    std::string path_;
    FILE* file_ = nullptr;
};

// The last 128 losses, or norms, which tell what is an outlier (llm.c's -sl, -sg): a value whose z-score
// among them, (value - mean) / standard deviation, is above z. The value itself is one of the 128.
class Outliers {
  public:
    static constexpr size_t WINDOW = 128;

    // The largest value that is not yet an outlier; infinite while there are too few. From d = value - mean
    // of the others, whose variance is v, mean and variance of all n = 128 are mean + d/n and (n-1)/n v +
    // (n-1)/n^2 d^2. So the z-score is z where d^2 = z^2 n v / (n - 1 - z^2).
    double limit(double z) const {
        if (z <= 0 || values_.size() < WINDOW - 1) return INFINITY;
        double n = WINDOW, mean = 0, variance = 0;
        for (size_t i = values_.size() - (WINDOW - 1); i < values_.size(); i++) mean += values_[i] / (n - 1);
        for (size_t i = values_.size() - (WINDOW - 1); i < values_.size(); i++)
            variance += (values_[i] - mean) * (values_[i] - mean) / (n - 1);
        return mean + z * std::sqrt(n * variance / (n - 1 - z * z));
    }
    void add(double value) {
        values_.push_back(value);
        if (values_.size() > WINDOW) values_.erase(values_.begin());
    }
    // For the state file, to the last bit.
    std::string text() const {
        std::string s;
        for (double v : values_) s += strf("%s%.17g", s.empty() ? "" : " ", v);
        return s;
    }
    void restore(const std::string& text) {
        values_.clear();
        char* end;
        for (const char* at = text.c_str(); *at; at = end) {
            double v = strtod(at, &end);
            if (end == at) break;
            add(v);
        }
    }

  private:
    std::vector<double> values_;
};

struct Evaluation {
    double nats = 0;             // mean per token
    double nats_per_char = NAN;  // NaN without a tokenizer
    size_t tokens = 0;
    std::string text() const {
        std::string s = strf("loss %.4f, perplexity %.2f", nats, std::exp(nats));
        if (nats_per_char == nats_per_char) s += strf(", %.4f bits per character", nats_per_char / M_LN2);
        return s;
    }
};

// Mean loss over the first `tokens` targets of the file (0: all), whatever the batch size. Tags are no
// targets. Each rank evaluates its share of the batches.
template <class Model>
Evaluation evaluate(Model& model, const EvalLoader& loader, size_t B, size_t T, size_t tokens,
                    const Tokenizer* tokenizer, std::vector<int>& x, std::vector<int>& y) {
    Evaluation e;
    Comm alone, &comm = model.ranks.comm ? *model.ranks.comm : alone;
    double sum = 0;
    size_t chars = 0, left = tokens ? tokens : SIZE_MAX;  // targets from batch i on
    for (size_t i = 0; i < loader.batches() && left && !g_stop; i++) {
        const size_t here = std::min(left, loader.targets(i));
        left -= here;
        if (i % (size_t)comm.world != (size_t)comm.rank) continue;
        loader.get(i, x.data(), y.data());
        size_t seen = 0;
        for (size_t k = 0; k < B * T; k++)
            if (y[k] >= 0 && seen++ >= here) y[k] = -1;
        double loss = model.forward(x.data(), y.data(), B, T, Pass{});
        sum += loss * (double)model.counted(), e.tokens += model.counted();
        if (tokenizer)
            for (size_t k = 0; k < B * T; k++)
                if (y[k] >= 0) chars += (size_t)tokenizer->chars(y[k]);
    }
    double all[] = {sum, (double)e.tokens, (double)chars};
    comm.all_reduce(all, 3);
    sum = all[0], e.tokens = (size_t)all[1], chars = (size_t)all[2];
    e.nats = sum / (double)std::max<size_t>(e.tokens, 1);
    if (chars) e.nats_per_char = sum / (double)chars;
    return e;
}

// ---------------------------------------------------------------------------------------------
// Training

template <class Model, class Decoder>
class Run {
  public:
    Run(int argc, char** argv) : flags_(Model::PROGRAM, "trains and fine-tunes GPT-2 on poems") {
        check_model<Model>();
        add_flags(flags_, o_, Model::PROGRAM);
        flags_.version(version_);
        flags_.parse(argc, argv);
    }

    int main() {
        signal(SIGPIPE, SIG_IGN);     // output that nobody reads any more ends nothing: see show()
        signal(SIGUSR1, [](int) {});  // until training begins there is nothing to save
        comm_ = Model::open_ranks({o_.gpus, o_.zero_stage, o_.device, o_.rank_timeout});
        if (comm_->world == 1) return run();
        try {
            comm_->connect();
            if (!comm_->leads() && !freopen("/dev/null", "w", stdout)) {}  // rank 0 prints
            return run();
        } catch (const UsageError& e) {
            return end_ranks(e.what(), 2);
        } catch (const std::bad_alloc&) {
            return end_ranks("out of memory", 1);
        } catch (const std::exception& e) {
            return end_ranks(e.what(), 1);
        }
    }

  private:
    // What is wrong for all ranks is said by rank 0, which ends the others before they speak.
    int end_ranks(const char* why, int code) {
        // Rank 0 gives its Comm a moment to say that another rank's death is the cause.
        usleep(comm_->leads() ? 200000 : 1000000);
        fflush(stdout);
        comm_->abort(code, strf("%s: rank %d: %s\n", Model::PROGRAM, comm_->rank, why));
        return code;
    }
    int run() {
        Model::require_device();
        if (o_.out.empty()) throw UsageError("--out is empty, wanted a folder");
        while (o_.out.size() > 1 && o_.out.back() == '/') o_.out.pop_back();
        open_existing_folder();
        if (o_.resume) resume();
        else prepare_run("", "");
        if (o_.max_steps == 0) return only_evaluate();
        settings_text_ = settings_to_keep();
        comm_->barrier();                                        // until all ranks have read the state
        if (o_.resume && comm_->leads() && keep_better_model())  // before open_logs() cuts what tells of it
            rewrite_state();
        comm_->broadcast(&progress_.best_val, sizeof progress_.best_val);
        comm_->broadcast(&progress_.best_step, sizeof progress_.best_step);
        if (comm_->world > 1) check_ranks_agree();
        Signals signals;
        if (comm_->leads()) open_logs();
        if (o_.resume) comm_->set_hint("go on with: " + resume_command());
        try {
            train();
        } catch (const LogFile::Full&) {  // what has been learnt is saved, if it can be
            end_line();
            progress_.pending = validation_due(progress_.step);
            follow_folder();
            if (progress_.step == started_ && progress_.step) save();
            throw;
        } catch (...) {
            end_line();
            throw;
        }
        folder_.close();
        return 0;
    }

    // Goes on from the last checkpoint in --out.
    void resume() {
        for (const char* flag : {"init_from", "overwrite"})
            if (flags_.on_command_line(flag))
                throw UsageError(
                    strf("--%s does not go with --resume, which goes on from the last checkpoint in "
                         "--out; leave one of them out",
                         flag));
        std::vector<int> steps = checkpoints_in(o_.out);
        if (steps.empty() && comm_->leads())
            fail("--resume: %s holds no checkpoint (model_*.bin with state_*.bin)", o_.out.c_str());
        // Rank 0's, since a network's file system may show another rank the folder as it was.
        int newest = steps.empty() ? -1 : steps.back();
        comm_->broadcast(&newest, sizeof newest);
        const std::string model = numbered(o_.out, "model", newest),
                          state = numbered(o_.out, "state", newest),
                          shards = state.substr(0, state.rfind('.')) + "_rank";
        try {
            prepare_run(model, state);
        } catch (const UsageError&) {
            throw;
        } catch (const Error& e) {
            const std::string what = e.what();
            size_t named = 0;  // how much of it names one of these files
            for (const std::string& file : {model, state, shards})
                if (what.compare(0, file.size(), file) == 0) named = file.size();
            if (!named || steps.size() < 2 || what.find(": cannot", named) != std::string::npos) throw;
            fail("%s; to resume from the checkpoint before, move %s%s and %s elsewhere", e.what(),
                 model.c_str(), has_shards(o_.out, newest) ? (", " + shards + "*.bin").c_str() : "",
                 state.c_str());
        }
    }

    // Everything up to a model in memory. With a checkpoint's files, restores its settings and progress.
    void prepare_run(const std::string& model_path, const std::string& state_path) {
        std::unique_ptr<StateReader> state;
        if (!state_path.empty()) {
            state = std::make_unique<StateReader>(state_path);
            try {
                changed_ = flags_.restore(state->settings);
            } catch (const UsageError&) {
                throw;
            } catch (const Error& e) {
                fail("%s: %s", state_path.c_str(), e.what());
            }
            take_saved_optimizer(*state, model_path);
            progress_ = state->progress;
            FieldReader{state->settings}("val_tokens", val_tokens_before_);
            o_.init_from = model_path;
            // --data also replaces the run's train_data and val_data, unless they are given too.
            for (const char* flag : {"train_data", "val_data"})
                if (flags_.on_command_line("data") && !flags_.on_command_line(flag)) {
                    flags_.forget(flag);
                    (flag[0] == 't' ? o_.train_data : o_.val_data).clear();
                }
            if (!flags_.on_command_line("data")) {
                find_own(o_.train_data, "train_data", state->fingerprints.train);
                find_own(o_.val_data, "val_data", state->fingerprints.val);
            }
        } else if (!o_.max_steps && o_.init_from.empty()) {
            throw UsageError("--max_steps 0 evaluates a checkpoint: name one with -e FILE");
        }
        settle_settings();
        fit_memory(o_.max_steps > 0);
        load_data();
        compare_data(state ? state->fingerprints : Fingerprints());
        if (o_.max_steps > 0 && comm_->leads())
            open_folder(), print_table();  // says what memory is needed before any is taken
        build_model(state.get());
    }

    // A run goes on with the optimizer that it was saved with. (Earlier programs, whose states do not name
    // it, had only AdamW.)
    void take_saved_optimizer(const StateReader& state, const std::string& model_path) {
        std::string saved;
        FieldReader{state.settings}("optimizer", saved);
        if (saved.empty()) saved = name_of(ADAMW);
        if (flags_.on_command_line("optimizer") && !o_.optimizer.empty() && o_.optimizer != saved)
            throw UsageError(strf(
                "--optimizer %s: %s was saved with %s, which keeps other numbers; to train its model on with "
                "%s, start a new run from it: --init_from %s --out DIR, with a --learning_rate",
                o_.optimizer.c_str(), state.path().c_str(), saved.c_str(), o_.optimizer.c_str(),
                shell_quoted(model_path).c_str()));
        o_.optimizer = saved;
    }

    // Locks --out, and finishes what an earlier run in it had begun. Rank 0 does it for all.
    void open_existing_folder() {
        const bool there = o_.resume ? !checkpoints_in(o_.out).empty() || file_exists(o_.out + "/.new")
                                     : o_.max_steps && file_exists(o_.out + "/.");
        if (!comm_->leads()) folder_.name(o_.out);
        else if (there) lock_folder();
        comm_->barrier();
    }
    void lock_folder() {
        const std::string what = folder_.open(o_.out);
        if (!what.empty()) printf("%s\n", what.c_str());
    }

    // The data of a run that was moved or copied with its folder are in OUT/data.
    void find_own(std::string& path, const char* flag, uint64_t checksum) {
        const std::string own = o_.out + "/data/" + path.substr(path.rfind('/') + 1);
        if (path.empty() || flags_.on_command_line(flag) || path.find('*') != std::string::npos ||
            !file_exists(own))
            return;
        auto is_it = [&](const std::string& file) { return TokenFile(file).checksum() == checksum; };
        if (!file_exists(path) || (checksum && !is_it(path) && is_it(own))) path = own;
    }

    // Fills in what the command line left open.
    void settle_settings() {
        if (o_.threads > 0) Model::set_threads(o_.threads);
        else if (int n = machine::fair_threads(comm_->on_host)) Model::set_threads(n);
        precision_ = precision();
        take_depth_names();
        find_data();
        if (!o_.init_from.empty()) take_checkpoint_sizes();
        find_tokenizer();
        if (o_.init_from.empty()) take_preset_sizes();
        if (!o_.seq_len) o_.seq_len = cfg_.maxT;
        count_epochs();
        apply_preset_defaults(o_, cfg_, fine_tunes());
        check_muon_rate();
        settle_batch();
        check_prompt();
    }
    Ranks ranks() const { return {comm_.get(), comm_->can_shard() ? o_.zero_stage : 0}; }
    bool fine_tunes() const { return !o_.init_from.empty() && !o_.resume; }

    // llm.c's -e d12: random weights of the published size with 12 layers, unless there is a file of that
    // name.
    void take_depth_names() {
        struct {
            const char *name, *preset;
        } sizes[] = {{"d6", "char"},
                     {"d12", "gpt2"},
                     {"d24", "gpt2-medium"},
                     {"d36", "gpt2-large"},
                     {"d48", "gpt2-xl"}};
        for (auto& size : sizes) {
            if (o_.init_from != size.name || file_exists(o_.init_from)) continue;
            if (flags_.on_command_line("preset"))
                throw UsageError(strf("--init_from %s and --preset %s both name sizes; leave one of them out",
                                      size.name, o_.preset.c_str()));
            o_.init_from.clear(), o_.preset = size.preset;
            if (!o_.seq_len) o_.seq_len = 1024;
            return;
        }
    }

    void check_muon_rate() {
        if (flags_.on_command_line("muon_learning_rate") && o_.muon_learning_rate > 0 &&
            optimizer_of(o_) == ADAMW)
            throw UsageError(strf("--muon_learning_rate %g: AdamW has no use for it, wanted --optimizer muon",
                                  o_.muon_learning_rate));
    }
    // --epochs as a number of steps. Needs the batch, which the preset may decide. A resumed run keeps its
    // steps.
    void count_epochs() {
        if (!(o_.epochs > 0) || !o_.max_steps ||
            (o_.resume && !flags_.on_command_line("epochs") && !flags_.on_command_line("max_steps")))
            return;
        if (flags_.on_command_line("max_steps") && flags_.on_command_line("epochs"))
            throw UsageError("--epochs and --max_steps both say how long to train; leave one of them out");
        if (o_.resume && flags_.on_command_line("max_steps")) {
            o_.epochs = 0;
            return;
        }
        Options sizes = o_;
        apply_preset_defaults(sizes, cfg_, fine_tunes());
        double tokens = o_.total_batch_size
                            ? o_.total_batch_size
                            : (double)sizes.batch_size * o_.seq_len * micro_steps_by_default() * comm_->world;
        double steps = std::ceil((double)o_.epochs * tokens_per_epoch((size_t)o_.seq_len) / tokens);
        if (steps > MOST_STEPS)
            throw UsageError(
                strf("--epochs %g is %.3g steps, wanted at most %d", o_.epochs, steps, MOST_STEPS));
        o_.max_steps = (int)steps;
    }
    size_t micro_steps_by_default() const { return fine_tunes() && cfg_.C > 512 ? 32 : 1; }

    // The files of the data folder, where flags name no others.
    void find_data() {
        finish_data_set(o_.data);
        if (o_.train_data.empty()) o_.train_data = o_.data + "/train.bin";
        if (o_.val_data.empty()) {
            bool beside = flags_.on_command_line("train_data") && !flags_.on_command_line("data");
            o_.val_data = (beside ? dirname_of(o_.train_data) : o_.data) + "/val.bin";
        }
        const bool many = o_.train_data.find('*') != std::string::npos;
        if (o_.max_steps && !many && !file_exists(o_.train_data) && !flags_.on_command_line("train_data")) {
            if (o_.resume)
                fail("%s: not found; if the data have moved, name the folder: --data DIR",
                     o_.train_data.c_str());
            fail_without_data(o_.data, "train.bin", Model::PROGRAM);
        }
        if (o_.max_steps) train_file_ = std::make_unique<TokenFile>(o_.train_data);
    }

    // The tokenizer: the one that --tokenizer names; else that of the run, if one is resumed; else the one in
    // the folder of the data or of the checkpoint. A new model needs it for the size of its vocabulary; one
    // from a checkpoint can do without. One that no flag names and that has another size does not belong to
    // the model: it is ignored, with a message.
    void find_tokenizer() {
        const std::string own = o_.out + "/tokenizer.bin";
        std::vector<std::string> places;
        bool named = flags_.on_command_line("tokenizer");
        if (named) places = {o_.tokenizer};
        else if (o_.resume && file_exists(own)) places = {own};
        else {
            if (flags_.on_command_line("data")) places.push_back(o_.data + "/tokenizer.bin"), named = true;
            if (flags_.on_command_line("train_data"))
                places.push_back(dirname_of(o_.train_data) + "/tokenizer.bin");
            if (flags_.on_command_line("val_data"))
                places.push_back(dirname_of(o_.val_data) + "/tokenizer.bin");
            if (!o_.init_from.empty()) places.push_back(dirname_of(o_.init_from) + "/tokenizer.bin");
            if (places.empty() || !flags_.on_command_line("data"))
                places.push_back(o_.data + "/tokenizer.bin");
        }
        const bool sized = !o_.init_from.empty();
        std::string left_out;
        for (size_t i = 0; i < places.size() && !tokenizer_; i++) {
            if (!file_exists(places[i])) continue;
            Tokenizer t = Tokenizer::load(places[i]);
            if (!sized || t.vocab_size() == cfg_.V) {
                tokenizer_ = std::make_unique<Tokenizer>(std::move(t)), o_.tokenizer = places[i];
            } else if (named && i == 0) {
                fail("%s: has %d tokens, %s has a vocabulary of %d", places[i].c_str(), t.vocab_size(),
                     o_.init_from.c_str(), cfg_.V);
            } else if (left_out.empty()) {
                left_out = strf("%s is left out: it has %d tokens, the model %d", places[i].c_str(),
                                t.vocab_size(), cfg_.V);
            }
        }
        if (!tokenizer_ && (flags_.on_command_line("tokenizer") || !sized))
            fail("%s: tokenizer not found", places[0].c_str());
        if (!tokenizer_ && !left_out.empty())
            printf("%s, so there are no poems and no losses per character\n", left_out.c_str());
        if (!tokenizer_) o_.tokenizer.clear();
        const std::string theirs = dirname_of(o_.init_from) + "/tokenizer.bin";
        if (tokenizer_ && sized && !o_.resume && !flags_.on_command_line("tokenizer") &&
            file_exists(theirs) && Reader(theirs).rest() != Reader(o_.tokenizer).rest())
            fail("%s: is not the tokenizer of %s, which is %s: prepare the poems with --tokenizer %s",
                 o_.tokenizer.c_str(), o_.init_from.c_str(), theirs.c_str(), shell_quoted(theirs).c_str());
    }

    // A prompt that cannot be written fails now, not at the first poem.
    void check_prompt() {
        if (!tokenizer_ || !o_.sample_every || !o_.max_steps) return;
        prompt_ = prompt_of_flags(*tokenizer_, recipe_for(o_.tokenizer), o_.prompt, "--prompt_tags",
                                  o_.prompt_tags, T_);
    }

    // The checkpoint's sizes are used; a flag that asks for another one is refused.
    void take_checkpoint_sizes() {
        const char* file = o_.init_from.c_str();
        checkpoint_ = std::make_unique<ModelReader>(o_.init_from);
        cfg_ = checkpoint_->cfg;
        struct {
            const char* flag;
            int given, have;
        } shape[] = {{"depth", o_.depth, cfg_.L},
                     {"heads", o_.heads, cfg_.NH},
                     {"channels", o_.channels, cfg_.C}};
        for (auto& s : shape)
            if (s.given && s.given != s.have)
                throw UsageError(
                    strf("%s: has %s %d, --%s asks for %d", file, s.flag, s.have, s.flag, s.given));
        if (flags_.given("preset") && !o_.resume)
            throw UsageError(
                strf("%s: has sizes of its own (%s); leave --preset out", file, cfg_.text().c_str()));
        if (!o_.activation.empty() && activation() != cfg_.activation)
            throw UsageError(strf("%s: has activation %s, --activation asks for %s", file,
                                  cfg_.activation == GELU_ERF ? "gelu" : "gelu_new", o_.activation.c_str()));
        if (o_.seq_len > cfg_.maxT)
            throw UsageError(strf("%s: takes at most %d tokens of context, --seq_len asks for %d", file,
                                  cfg_.maxT, o_.seq_len));
    }

    void take_preset_sizes() {
        cfg_ = preset_config(o_.preset);
        if (o_.depth) cfg_.L = o_.depth;
        if (o_.heads) cfg_.NH = o_.heads;
        if (o_.channels) cfg_.C = o_.channels;
        if (cfg_.C % cfg_.NH)
            throw UsageError(strf("--channels is %d, wanted a multiple of --heads = %d", cfg_.C, cfg_.NH));
        if (o_.seq_len > 0) cfg_.maxT = o_.seq_len;
        cfg_.activation = activation();
        cfg_.V = tokenizer_->vocab_size(), cfg_.Vp = pad_vocab(cfg_.V);
    }
    int activation() const { return o_.activation == "gelu" ? GELU_ERF : GELU_TANH; }

    // Batch, tokens of a step, and how many micro-batches make a step. Fine-tuning a model of GPT-2's size
    // accumulates 32 of them, as the original experiment did.
    void settle_batch() {
        B_ = (size_t)o_.batch_size, T_ = (size_t)o_.seq_len;
        size_t tokens = B_ * T_;
        if (tokens > INT32_MAX)
            throw UsageError(strf("--batch_size %zu x --seq_len %zu is %zu tokens, wanted at most %d", B_, T_,
                                  tokens, INT32_MAX));
        if (!o_.total_batch_size) {
            o_.total_batch_size =
                (int)std::min<size_t>(tokens * micro_steps_by_default() * (size_t)comm_->world, INT32_MAX);
        }
        const size_t at_once = tokens * (size_t)comm_->world;
        if ((size_t)o_.total_batch_size % at_once)
            throw UsageError(strf(
                "--total_batch_size is %d, wanted a multiple of %sbatch_size x seq_len = %s%zu x %zu = %zu",
                o_.total_batch_size, comm_->world > 1 ? "ranks x " : "",
                comm_->world > 1 ? strf("%d x ", comm_->world).c_str() : "", B_, T_, at_once));
        micro_steps_ = (size_t)o_.total_batch_size / at_once;
        if (flags_.on_command_line("val_batches") && flags_.on_command_line("val_tokens"))
            throw UsageError(
                "--val_batches and --val_tokens both say how much to validate; leave one of them out");
        if (o_.val_batches >= 0)
            o_.val_tokens = (int)std::min<size_t>((size_t)o_.val_batches * tokens, INT32_MAX),
            o_.val_batches = -1;
    }

    Precision precision() const {
        Precision p = {Model::DEFAULT_DTYPE, o_.master_weights, o_.deterministic};
        if (o_.dtype == "bf16") p.dtype = BF16;
        else if (o_.dtype == "fp32") p.dtype = FP32;
        else if (o_.dtype == "fp16")
            throw UsageError(
                "--dtype: fp16 is not supported, its range is too small for gradients without loss scaling; "
                "take bf16");
        else if (!o_.dtype.empty())
            throw UsageError(strf("--dtype: '%s' is unknown; known are fp32, bf16", o_.dtype.c_str()));
        Model::check_precision(p);
        return p;
    }

    Optimizer optimizer() const { return optimizer_of(o_); }
    TagTokens tag_tokens() const {
        if (!tokenizer_ || !tokenizer_->tags()) return {};
        return {tokenizer_->first_tag(), tokenizer_->eot(), tokenizer_->tag_columns().size()};
    }
    // Tokens of a batch, those of tags included, that make a pass over the training data.
    double tokens_per_epoch(size_t T) const {
        const size_t tags = std::min(tag_tokens().count, T - 1);
        return (double)train_file_->size() * (double)T / (double)(T - tags);
    }
    void load_data() {
        if (o_.max_steps > 0) {
            train_file_->check_vocab(cfg_.V);
            train_loader_ = std::make_unique<TrainLoader>(*train_file_, (int)T_, o_.seed, o_.shuffle,
                                                          comm_->rank, comm_->world, tag_tokens());
            train_loader_->seek(progress_.position);
        }
        if (file_exists(o_.val_data)) {
            val_file_ = std::make_unique<TokenFile>(o_.val_data);
            val_file_->check_vocab(cfg_.V);
            val_loader_ = std::make_unique<EvalLoader>(*val_file_, (int)B_, (int)T_, tag_tokens());
        } else if (flags_.on_command_line("val_data") || o_.max_steps == 0) {
            fail("%s: validation tokens not found", o_.val_data.c_str());
        }
        if (o_.patience && o_.max_steps && !validates())
            throw UsageError(strf("--patience %d: there are no validations, %s", o_.patience,
                                  val_loader_ ? "--val_every is 0" : (o_.val_data + " is missing").c_str()));
    }

    // Where memory is short: recomputes more, then accumulates over smaller batches; but never changes what a
    // flag has set, and so nothing in a resumed run.
    void fit_memory(bool trains) {
        // What is free for each rank of a machine; of all ranks the least, so that they decide alike.
        std::vector<size_t> free = comm_->gather(Model::memory_available(comm_->on_host));
        size_t have = *std::min_element(free.begin(), free.end());
        size_t poem = trains && o_.sample_every && tokenizer_ ? key_value_bytes(cfg_, 1, T_) : 0;
        auto need_of = [&](size_t B, int recompute) {
            return Model::memory_need(cfg_, B, T_, trains, recompute, precision_, ranks(), optimizer())
                       .total() +
                   poem;
        };
        size_t wanted = need_of(B_, o_.recompute), B = B_;
        int r = o_.recompute;
        while (need_of(B, r) > have && r < 3 && trains && !flags_.given("recompute")) r++;
        while (need_of(B, r) > have && B % 2 == 0 && !flags_.given("batch_size")) B /= 2;
        if (need_of(B, r) > have) {
            size_t fits = 0;
            for (size_t bit = (size_t)1 << 24; bit; bit >>= 1)
                if (fits + bit < B_ && need_of(fits + bit, r) <= have) fits += bit;
            if (flags_.given("total_batch_size"))
                while (fits && (size_t)o_.total_batch_size % (fits * T_ * (size_t)comm_->world)) fits--;
            std::string hint = fits ? strf("--batch_size %zu%s would fit", fits,
                                           r > o_.recompute ? strf(" --recompute %d", r).c_str() : "")
                                    : "not even --batch_size 1 would fit: take a smaller model or --seq_len";
            if (r < 3 && trains && need_of(B_, 3) <= have) hint += ", or --recompute 3 with this batch";
            fail("this run needs %s of memory, %s are free; %s", human_bytes((double)wanted).c_str(),
                 human_bytes((double)have).c_str(), hint.c_str());
        }
        if (r != o_.recompute || B != B_)
            printf(
                "memory is short (%s needed, %s free), so this run takes --recompute %d --batch_size %zu; "
                "the step stays %d tokens\n",
                human_bytes((double)wanted).c_str(), human_bytes((double)have).c_str(), r, B,
                o_.total_batch_size);
        micro_steps_ *= B_ / B;
        B_ = B, o_.batch_size = (int)B, o_.recompute = r;
        need_ = Model::memory_need(cfg_, B_, T_, trains, r, precision_, ranks(), optimizer());
        need_.scratch += poem;
    }

    void build_model(StateReader* state) {
        bool trains = o_.max_steps > 0;
        model_ =
            std::make_unique<Model>(cfg_, B_, T_, trains, o_.recompute, precision_, ranks(), optimizer());
        model_->dropout = o_.dropout, model_->seed = o_.seed;
        if (checkpoint_) params_checksum_ = load_model(*model_, *checkpoint_), checkpoint_.reset();
        else model_->init_weights(o_.seed);
        if (state && trains) {
            state->load_moments(*model_, params_checksum_, comm_->rank);
            model_->resumed((uint32_t)progress_.step);
        }
        x_.resize(B_ * T_), y_.resize(B_ * T_);
    }

    int only_evaluate() {
        double t0 = now();
        const bool some = flags_.on_command_line("val_tokens") || flags_.on_command_line("val_batches");
        const size_t tokens = some ? (size_t)o_.val_tokens : 0;
        const bool part = tokens && tokens < val_loader_->all_targets();
        Evaluation e = evaluate(*model_, *val_loader_, B_, T_, tokens, tokenizer_.get(), x_, y_);
        printf("%s on %s of %s: %s tokens in %.1f s\n", o_.init_from.c_str(),
               part ? "the beginning" : "the whole", o_.val_data.c_str(), commas(e.tokens).c_str(),
               now() - t0);
        printf("validation loss %.6f nats per token, perplexity %.3f\n", e.nats, std::exp(e.nats));
        if (e.nats_per_char == e.nats_per_char)
            printf("%.6f nats per character, %.6f bits per character\n", e.nats_per_char,
                   e.nats_per_char / M_LN2);
        return 0;
    }

    // Is progress_.best_val a loss on the tokens that this process validates on?
    bool best_counts() const {
        const Progress& p = progress_;
        return p.best_step < 0 || (!differs(p.best_data, fingerprints_.val) &&
                                   (p.best_tokens < 0 || p.best_tokens == o_.val_tokens));
    }
    static bool differs(uint64_t was, uint64_t is) { return was && is && was != is; }
    // Checksums of the data. Tells the user which data are not those of the resumed run, and refuses another
    // tokenizer. `saved` is 0 in a new run.
    void compare_data(Fingerprints saved) {
        fingerprints_.train = train_file_ ? train_file_->checksum() : saved.train;
        fingerprints_.val = val_file_ ? val_file_->checksum() : saved.val;
        if (saved.val && !val_file_ && o_.val_every)
            fail(
                "%s: not found; if the data have moved, name the folder: --data DIR; --val_every 0 goes on "
                "without validation",
                o_.val_data.c_str());
        fingerprints_.tokenizer = tokenizer_ ? file_checksum(o_.tokenizer) : saved.tokenizer;
        // The tokens may have been made with another tokenizer than the run's, which is in --out.
        const std::string of_data = dirname_of(o_.train_data) + "/tokenizer.bin";
        for (const std::string& file : {o_.tokenizer, of_data})
            if (tokenizer_ && file_exists(file) && differs(saved.tokenizer, file_checksum(file)))
                fail(
                    "%s: is not the tokenizer of the run in %s: a model reads only the tokens that it "
                    "learnt; "
                    "name the run's data, or train a new model",
                    file.c_str(), o_.out.c_str());
        if (differs(saved.train, fingerprints_.train))
            printf("the training data are not those of the run: %s\n", o_.train_data.c_str());
        if (progress_.best_tokens < 0)  // the state of an earlier version
            progress_.best_data = saved.val, progress_.best_tokens = val_tokens_before_;
        const bool other_data = differs(progress_.best_data, fingerprints_.val);
        if (other_data || differs(saved.val, fingerprints_.val))
            printf("the validation data are not those of the run%s: %s\n",
                   best_counts() ? "" : ", so the best loss so far no longer counts", o_.val_data.c_str());
        else if (!best_counts())
            printf("validation now uses other tokens, so the best loss so far no longer counts\n");
    }
    static uint64_t file_checksum(const std::string& path) {
        std::string bytes = Reader(path).rest();
        return checksum_of(bytes.data(), bytes.size());
    }

    // Makes the output folder, and locks it. Refuses to replace a run without --overwrite.
    void open_folder() {
        make_dirs(o_.out);
        if (o_.resume) return;  // has been opened
        if (holds_run(o_.out) && !o_.overwrite)
            fail(
                "%s: already holds a run; --resume goes on with it, --overwrite starts anew, -o DIR takes "
                "another folder",
                o_.out.c_str());
        if (!folder_.is_open()) lock_folder();
        folder_.begin(folder_.final_place(o_.train_data) != o_.train_data);
    }

    // The run's flags for the state file: sizes as they are now, paths that hold from any folder, and data in
    // OUT/.new as they will be found.
    std::string settings_to_keep() {
        o_.depth = cfg_.L, o_.heads = cfg_.NH, o_.channels = cfg_.C;
        o_.activation = cfg_.activation == GELU_ERF ? "gelu" : "gelu_new";
        if (!fingerprints_.val) o_.val_data.clear();
        for (std::string* path : {&o_.data, &o_.train_data, &o_.val_data, &o_.tokenizer})
            if (!path->empty())
                *path =
                    std::filesystem::weakly_canonical(std::filesystem::absolute(folder_.final_place(*path)));
        return flags_.values();
    }

    // Ranks that were started with other flags, data or checkpoints than rank 0 would train another model.
    void check_ranks_agree() {
        struct {
            uint64_t program, train, val, tokenizer, model, settings;
            char host[64];
        } mine = {checksum_of(version_.data(), version_.size()),
                  fingerprints_.train,
                  fingerprints_.val,
                  fingerprints_.tokenizer,
                  model_checksum(*model_),
                  checksum_of(settings_text_.data(), settings_text_.size()),
                  ""};
        gethostname(mine.host, sizeof mine.host - 1);
        auto all = comm_->gather(mine);
        for (size_t r = 1; r < all.size(); r++) {
            const auto &a = all[r], &b = all[0];
            const char* what = a.program != b.program       ? "another program"
                               : a.train != b.train         ? "other training data"
                               : a.val != b.val             ? "other validation data"
                               : a.tokenizer != b.tokenizer ? "another tokenizer"
                               : a.model != b.model         ? "another model"
                               : a.settings != b.settings   ? "other flags"
                                                            : nullptr;
            if (what)
                fail(
                    "rank %zu on %s has %s than rank 0 on %s; start all with the same program, flags and "
                    "files",
                    r, a.host, what, b.host);
        }
    }

    void open_logs() {
        const int at = progress_.step;
        const bool pending = progress_.pending;         // the validation after this step is made again
        bool has_row = !at || pending, has_loss = !at;  // of the last step
        auto keep_csv = [&](const std::string& line) {
            int s = step_of_row(line);
            has_row = has_row || s == at;
            return s >= 0 && (pending ? s < at : s <= at);
        };
        auto keep_main = [&](const std::string& line) {
            int s;
            char kind[8] = "";
            if (sscanf(line.c_str(), "s:%d %3s", &s, kind) != 2) return false;
            has_loss = has_loss || (s == at - 1 && !strcmp(kind, "trl"));
            return strcmp(kind, "trl") && !pending ? s <= at : s < at;
        };
        const std::string dir = folder_.dir();
        csv_ = std::make_unique<LogFile>(dir + "/log.csv", CSV_HEADER,
                                         o_.resume ? keep_csv : std::function<bool(const std::string&)>());
        log_ = std::make_unique<LogFile>(dir + "/main.log", "",
                                         o_.resume ? keep_main : std::function<bool(const std::string&)>());
        if (tokenizer_) {
            const std::string own = dir + "/tokenizer.bin";
            if (o_.resume && file_exists(own) && file_checksum(own) != file_checksum(o_.tokenizer))
                printf("tokenizer.bin was another one, which is now %s\n",
                       set_aside(o_.out, "tokenizer.bin").c_str());
            tokenizer_->save(own);
        }
        if (const std::string from = recipe_beside(o_.tokenizer), to = dir + "/recipe.txt";
            tokenizer_ && file_exists(from) && from != to) {
            AtomicFile recipe(to);
            recipe.write(Reader(from).rest());
            recipe.commit();
        }
        // A full disk may have cut them off just before the checkpoint.
        if (o_.resume && !has_loss) log_loss();
        if (o_.resume && !has_row) write_row(nullptr);
    }
    // Where all ranks are needed to save, a full disk stops them all after this step, as a signal does.
    void log_line(LogFile& file, const std::string& line) try {
        file.line(line);
    } catch (const LogFile::Full& e) {
        if (!model_->sharded()) throw;
        log_full_ = e.what(), g_stop = SIGTERM;
    }
    void log_loss() {
        const auto& r = progress_.last;
        log_line(*log_, strf("s:%d trl:%.4f lr:%.6f norm:%.2f", progress_.step - 1, r.loss, r.lr, r.norm));
    }

    // The step of a row of log.csv; -1 in the header.
    static int step_of_row(const std::string& row) {
        char* end;
        long s = strtol(row.c_str(), &end, 10);
        return *end == ',' && end != row.c_str() ? (int)s : -1;
    }
    // The run may have gone on after the checkpoint that it is resumed from. If it then had a better loss, as
    // log.csv tells, model.bin holds that model, and stays the best until a better one comes. Returns true if
    // it did.
    bool keep_better_model() {
        const double before = progress_.best_val;
        if (!best_counts() || !file_exists(o_.out + "/model.bin") || !file_exists(o_.out + "/log.csv"))
            return false;
        std::string text = Reader(o_.out + "/log.csv").rest();
        text.resize(text.rfind('\n') + 1);  // a full disk may have cut the last row, and its loss, short
        std::istringstream rows(text);
        for (std::string row; std::getline(rows, row);) {
            double loss;
            if (step_of_row(row) <= progress_.step || sscanf(row.c_str(), "%*d,%*f,%*f,%lf", &loss) != 1)
                continue;
            if (loss < progress_.best_val) set_best(loss, step_of_row(row));
        }
        return progress_.best_val < before;
    }

    // A run goes on in a folder that was moved or renamed.
    void follow_folder() {
        const std::string now = folder_.follow();
        if (now.empty()) return;
        end_line();
        printf("%s was moved; the run goes on in %s\n", o_.out.c_str(), now.c_str());
        o_.out = now;
        csv_->moved(folder_.dir() + "/log.csv"), log_->moved(folder_.dir() + "/main.log");
    }

    // A model was written: from now on this is the run in --out.
    void take_place() {
        if (!folder_.aside()) return;
        std::string what = folder_.take_place();
        csv_->moved(o_.out + "/log.csv"), log_->moved(o_.out + "/main.log");
        if (what.empty()) return;
        end_line();
        printf("%s\n", what.c_str());
    }

    // What each rank keeps only its share of.
    static const char* shares(int zero_stage) {
        return zero_stage == 0   ? ""
               : zero_stage == 1 ? "; each keeps a share of the optimizer's state"
                                 : "; each keeps a share of the gradients and of the optimizer's state";
    }
    void print_table() {
        Peak peak = Model::peak_flops(precision_);
        peak_ = peak.flops;
        auto row = [](const char* name, const std::string& value) {
            printf("%-16s %s\n", name, value.c_str());
        };
        row("program", version_);
        auto size = [](size_t b) { return human_bytes((double)b); };
        row("machine", Model::device() + strf(", peak %.0f GFLOP/s %s", peak_ / 1e9, peak.source.c_str()));
        if (comm_->world > 1)
            row("ranks", strf("%d %s, %d of them on this machine%s", comm_->world, comm_->what(),
                              comm_->on_host, shares(ranks().zero_stage)));
        else if (o_.zero_stage) row("ranks", "one, so that --zero_stage has no effect");
        row("model", cfg_.text());
        row("parameters",
            commas(num_params(cfg_)) + (o_.init_from.empty() ? strf(" (random, seed %" PRIu64 ")", o_.seed)
                                                             : " from " + o_.init_from));
        row("training data", strf("%s: %s tokens, %.1f epochs in this run", o_.train_data.c_str(),
                                  commas(train_file_->size()).c_str(),
                                  (double)o_.max_steps * o_.total_batch_size / tokens_per_epoch(T_)));
        row("validation data", val_file_ ? o_.val_data + ": " + validated() : "none");
        row("batch",
            strf("%s%zu x %zu tokens%s", comm_->world > 1 ? strf("%d x ", comm_->world).c_str() : "", B_, T_,
                 micro_steps_ > 1
                     ? strf(", %zu accumulated: %d a step", micro_steps_, o_.total_batch_size).c_str()
                     : ""));
        auto every = [](const char* what, int n) {
            return n ? strf(", %s every %d", what, n) : strf(", no %s", what);
        };
        row("steps", std::to_string(o_.max_steps) +
                         (progress_.step ? strf(" (%d done)", progress_.step) : std::string()) +
                         every("validation", val_file_ ? o_.val_every : 0) +
                         every("poem", tokenizer_ ? o_.sample_every : 0) +
                         (o_.save_every ? every("checkpoint", o_.save_every) : ", a checkpoint at the end"));
        row("learning rate",
            strf("%g, %s to %g, warm-up %d steps", o_.learning_rate, o_.lr_schedule.c_str(),
                 o_.lr_schedule == "constant" ? o_.learning_rate : o_.learning_rate * o_.final_lr_fraction,
                 o_.warmup_steps));
        if (optimizer() == MUON)
            row("Muon", strf("the blocks' matrices, learning rate %g, momentum %g; the rest by AdamW",
                             muon_peak(), StepSettings().muon_momentum));
        row("AdamW", strf("beta %g %g, eps %g, weight decay %g, gradient clip %g, dropout %g", o_.beta1,
                          o_.beta2, o_.eps, o_.weight_decay, o_.grad_clip, o_.dropout));
        row("memory", strf("%s: parameters %s, gradients %s, %s %s, activations %s, scratch %s",
                           size(need_.total()).c_str(), size(need_.params).c_str(), size(need_.grads).c_str(),
                           optimizer() == MUON ? "Muon and AdamW" : "AdamW", size(need_.optimizer).c_str(),
                           size(need_.activations).c_str(), size(need_.scratch).c_str()));
        row("output", o_.out + "/" +
                          (folder_.aside() && holds_run(o_.out)
                               ? "; the run that is there moves to previous/ when this one has a model"
                               : ""));
        for (const std::string& c : changed_) row("changed", c);
        if (o_.resume && progress_.step && progress_.step < o_.max_steps && !changed_.empty() &&
            std::fabs(lr_of(progress_.step) - progress_.last.lr) > 0.05 * progress_.last.lr)
            row("", strf("the learning rate was %.3g in the last step and goes on with %.3g",
                         progress_.last.lr, lr_of(progress_.step)));
        printf("\n");
        show();
    }
    // "1,157 tokens", or "2,000,000 tokens, of which a validation predicts the first 100,000 (5.0%)".
    std::string validated() const {
        std::string s = commas(val_file_->size()) + " tokens";
        size_t all = val_loader_->all_targets(), n = (size_t)o_.val_tokens;
        if (!n || n >= all) return s;
        return s + strf(", of which a validation predicts the first %s (%.1f%%)", commas(n).c_str(),
                        100.0 * (double)n / (double)all);
    }

    // Shows what was printed. Output that cannot be written, closed by `head` or a tee that died, ends
    // nothing: the logs in the run's folder go on.
    void show() {
        if (!fflush(stdout) && !ferror(stdout)) return;
        fprintf(stderr, "%s: standard output: cannot write: %s; training goes on, see %s/main.log\n",
                Model::PROGRAM, strerror(errno ? errno : EIO), folder_.dir().c_str());
        if (!freopen("/dev/null", "w", stdout)) clearerr(stdout);
    }

    // The loop. A device may still compute a step while the next is prepared, so its result is recorded one
    // step later. Validating, saving and sampling wait for it first (drain).
    void train() {
        started_ = progress_.step;
        losses_.restore(progress_.losses), norms_.restore(progress_.norms);
        bool done_before = o_.resume && !progress_.pending;  // validated and saved before the run was resumed
        for (;; done_before = false) {
            const int step = started_;
            const bool validate_now = validation_due(step), sample_now = sample_due(step);
            bool last = step >= o_.max_steps || (done_before && patience_ends()),
                 save_now = step && (last || due(o_.save_every, step)), stop = any_stops();
            if (!done_before && (last || stop || validate_now || sample_now || save_now)) {
                drain();
                if (comm_->leads()) follow_folder();
                Evaluation e;
                progress_.pending = validate_now && (stop || !validate(&e));
                if (validate_now && !progress_.pending) write_row(&e);
                stop = stop || any_stops();
                if (patience_ends()) last = save_now = true;
                save_now = std::exchange(save_soon_, false) || save_now;
                if (sample_now && !stop && comm_->leads()) sample();
                if (step && (save_now || stop)) {
                    if (model_->sharded() || comm_->leads()) save();
                    comm_->set_hint("go on with: " + resume_command());
                }
            }
            if (!log_full_.empty()) fail("%s", log_full_.c_str());
            if (stop) return say_stopped(step);
            if (last) break;
            one_step();
        }
        end_line();
        say_finished();
    }
    void set_best(double loss, int step) {
        progress_.best_val = loss, progress_.best_step = step;
        progress_.best_data = fingerprints_.val, progress_.best_tokens = o_.val_tokens;
    }
    // Was any rank asked to stop? Then all do, after the same step.
    bool any_stops() {
        int told = 0;
        for (int s : comm_->gather((int)g_stop)) told = told ? told : s;
        if (told) g_stop = told;
        return told;
    }
    bool validates() const { return val_loader_ && o_.val_every; }
    static bool due(int every, int step) { return every && step % every == 0; }
    // Have --patience validations passed since the best one?
    bool patience_ends() const {
        if (!o_.patience || !validates() || !due(o_.val_every, progress_.step) || progress_.best_step < 0 ||
            !best_counts())
            return false;
        return (progress_.step - progress_.best_step) / o_.val_every >= o_.patience;
    }
    bool validation_due(int step) const {
        return validates() && (step >= o_.max_steps || due(o_.val_every, step));
    }
    bool sample_due(int step) const {
        return o_.sample_every && tokenizer_ && step && (step >= o_.max_steps || due(o_.sample_every, step));
    }

    std::string resume_command() const {
        std::string command = beside_program(Model::PROGRAM) + " -o " + shell_quoted(o_.out) + " --resume";
        if (flags_.on_command_line("rank_timeout")) command += strf(" --rank_timeout %d", o_.rank_timeout);
        return comm_->start_again(command);
    }
    void say_stopped(int step) {
        end_line();
        if (step)
            printf("stopped by %s after step %d; go on with: %s\n", signal_name(g_stop), step,
                   resume_command().c_str());
        else printf("stopped before the first step; nothing to resume\n");
        show();
    }
    void say_finished() {
        if (progress_.step < o_.max_steps)
            printf("ended by --patience %d: no better validation since step %d; a larger one goes on\n",
                   o_.patience, progress_.best_step);
        else if (!session_steps_)
            printf("nothing to do: %d steps are done, --max_steps is %d; a larger --max_steps goes on\n",
                   progress_.step, o_.max_steps);
        printf("\n%d steps in %s of training. ", progress_.step, clock_text(progress_.seconds).c_str());
        if (progress_.best_step >= 0)
            printf("Best validation loss %.4f at step %d, kept in %s/model.bin\n", progress_.best_val,
                   progress_.best_step, o_.out.c_str());
        else printf("The model is %s/model.bin\n", o_.out.c_str());
        printf("loss curve: %s/log.csv (make plot OUT=%s draws it)\nmore poems: %s -e %s\n", o_.out.c_str(),
               shell_quoted(o_.out).c_str(), beside_program("sample_gpt2").c_str(),
               shell_quoted(o_.out + "/model.bin").c_str());
        show();
    }

    // Starts the next step, and records what is known by then: its result, or the result of the one before.
    void one_step() {
        if (started_ == progress_.step) clock_ = now();
        const int step = started_++;
        uint64_t first_window = train_loader_->position();
        const uint64_t targets = train_loader_->targets((uint64_t)o_.total_batch_size / T_);
        const float scale = 1.0f / (float)std::max<uint64_t>(targets, 1);
        for (size_t m = 0; m < micro_steps_; m++) {
            train_loader_->next((int)B_, x_.data(), y_.data());
            Pass pass;
            pass.train = true, pass.step = (uint32_t)step;
            // next() has moved the position by B windows of each rank; this rank's begin (world - rank) B
            // before it.
            pass.seq0 = train_loader_->position() - B_ * (size_t)(comm_->world - comm_->rank) - first_window;
            pass.grad_scale = scale, pass.last = m + 1 == micro_steps_;
            model_->accumulate(x_.data(), y_.data(), B_, T_, pass);
        }
        StepSettings a;
        a.lr = lr_of(step), a.muon_lr = scheduled(muon_peak(), step);
        a.beta1 = o_.beta1, a.beta2 = o_.beta2, a.eps = o_.eps, a.weight_decay = o_.weight_decay,
        a.grad_clip = o_.grad_clip;
        a.max_loss = losses_.limit(o_.skip_loss_z), a.max_norm = norms_.limit(o_.skip_norm_z);
        step_settings_[started_ % 2] = a;
        record(model_->step(a, (uint32_t)started_));
    }
    // Waits for the step that was started last, and records it.
    void drain() {
        if (progress_.step < started_) record(model_->last_result());
    }
    float lr_of(int step) const { return scheduled(o_.learning_rate, step); }
    float muon_peak() const {
        return o_.muon_learning_rate > 0 ? o_.muon_learning_rate : MUON_MULTIPLE * o_.learning_rate;
    }
    float scheduled(float peak, int step) const {
        return (float)learning_rate(o_.lr_schedule, peak, step, o_.warmup_steps, o_.max_steps,
                                    o_.final_lr_fraction);
    }

    // A step's result goes to progress, logs and screen. One that is not finite ends the run.
    void record(const StepResult& r) {
        if ((int)r.step <= progress_.step) return;  // nothing new: the step is still being computed
        const int step = progress_.step;
        if (!r.finite()) {
            std::vector<int> kept = checkpoints_in(folder_.dir());
            fail(
                "step %d: the %s is %s; training stops before it spoils a checkpoint (%s). Try a lower "
                "--learning_rate%s or --grad_clip",
                step + 1, std::isfinite(r.loss) ? "gradient norm" : "loss",
                std::isnan(std::isfinite(r.loss) ? r.norm : r.loss) ? "NaN" : "infinite",
                kept.empty()
                    ? "none written yet"
                    : ("the last good one is " + numbered(folder_.dir(), "model", kept.back())).c_str(),
                optimizer() == MUON ? ", --muon_learning_rate" : "");
        }
        // A step during which the process was stopped (Ctrl-Z) counts as long as the one before.
        const double time = now(), s = g_continued && session_steps_ ? progress_.last.seconds : time - clock_;
        clock_ = time, g_continued = 0;
        progress_.step++, progress_.seconds += s;
        progress_.smoothed = 0.95 * progress_.smoothed + 0.05 * r.loss;
        progress_.smoothed_weight = 0.95 * progress_.smoothed_weight + 0.05;
        session_steps_++, session_seconds_ += s;
        auto& last = progress_.last;
        last.loss = r.loss, last.smoothed = progress_.smoothed / progress_.smoothed_weight;
        last.norm = r.norm, last.lr = (double)lr_of(step), last.seconds = s;
        if (o_.skip_loss_z > 0) losses_.add(r.loss);
        if (o_.skip_norm_z > 0) norms_.add(r.norm);
        if (!comm_->leads()) return;
        log_loss();
        report();
        if (const StepSettings& a = step_settings_[r.step % 2]; !a.takes(r)) {
            end_line();
            bool loss = r.loss > a.max_loss;
            printf("step %u was skipped: its %s is %.4f, wanted at most %.4f (--skip_%s_z)\n", r.step,
                   loss ? "loss" : "gradient norm", loss ? r.loss : r.norm, loss ? a.max_loss : a.max_norm,
                   loss ? "loss" : "norm");
            show();
        }
        if (!validation_due(progress_.step)) write_row(nullptr);  // else validation writes it
    }

    // One line a step: redrawn in place on a terminal, plain lines elsewhere.
    void report() {
        int step = progress_.step;
        bool terminal = isatty(1);
        if (!terminal && step % o_.log_every && step != o_.max_steps) return;
        auto& r = progress_.last;
        double flops =
            step_flops(cfg_, (double)B_ * (double)micro_steps_, (double)T_) / r.seconds;  // a rank's
        struct {
            int priority;  // where the terminal is narrow, the largest number goes first
            std::string text;
        } parts[] = {{0, strf("step %*d/%d", (int)std::to_string(o_.max_steps).size(), step, o_.max_steps)},
                     {1, strf("loss %.4f", r.loss)},
                     {3, strf("mean %.4f", r.smoothed)},
                     {5, strf("norm %.3f", r.norm)},
                     {7, strf("lr %.2e", r.lr)},
                     {6, strf("%.0f ms", r.seconds * 1e3)},
                     {4, commas((uint64_t)(o_.total_batch_size / r.seconds)) + " tokens/s"},
                     {8, strf("%.0f%% of peak", 100 * flops / peak_)},
                     {2, "ETA " + clock_text(session_seconds_ / session_steps_ * (o_.max_steps - step))}};
        winsize window{};
        size_t width =
            terminal ? (ioctl(1, TIOCGWINSZ, &window) == 0 && window.ws_col ? window.ws_col : 80) : SIZE_MAX;
        std::string line;
        for (int kept = 9; kept > 0 && (line.empty() || line.size() >= width); kept--) {
            line.clear();
            for (auto& part : parts)
                if (part.priority < kept) line += (line.empty() ? "" : " | ") + part.text;
        }
        printf(terminal ? "\r%s\x1b[K" : "%s\n", line.c_str());
        open_line_ = terminal;
        show();
    }
    void end_line() {
        if (open_line_) printf("\n");
        open_line_ = false;
    }

    // False when a signal cut it short. The best model so far is kept; in fine-tuning the one that it starts
    // from counts too, so that model.bin is never worse.
    bool validate(Evaluation* e) {
        *e = evaluate(*model_, *val_loader_, B_, T_, (size_t)o_.val_tokens, tokenizer_.get(), x_, y_);
        if (any_stops()) return false;
        end_line();
        // keep_better_model() took best_val from log.csv, to nine digits. When its step comes again, it is
        // equal.
        const bool counts = best_counts();
        const bool again = counts && progress_.step && progress_.step == progress_.best_step &&
                           strf("%.9g", e->nats) == strf("%.9g", progress_.best_val);
        const bool best = again || ((progress_.step || fine_tunes()) &&
                                    e->nats < (counts ? progress_.best_val : (double)INFINITY));
        if (best) {
            if (comm_->leads()) save_best(), take_place();
            set_best(e->nats, progress_.step);
            // After a kill, the last checkpoint would take this loss in log.csv for one of its own tokens.
            save_soon_ = !counts;
        }
        if (std::isfinite(e->nats)) {
            printf("validation after step %d: %s%s\n", progress_.step, e->text().c_str(),
                   best ? strf(" (best so far: %s/model.bin)", folder_.dir().c_str()).c_str() : "");
            if (comm_->leads()) log_line(*log_, strf("s:%d tel:%.4f", progress_.step, e->nats));
        } else {
            printf("validation after step %d: the loss is not finite; this model is not kept\n",
                   progress_.step);
        }
        show();
        return true;
    }

    void write_row(const Evaluation* e) {
        if (!comm_->leads()) return;
        std::string s = std::to_string(progress_.step);
        const auto& r = progress_.last;
        if (progress_.step) s += strf(",%.9g,%.9g", r.loss, r.smoothed);
        else s += ",,";
        s += e && std::isfinite(e->nats) ? strf(",%.9g", e->nats) : ",";
        s += e && e->nats_per_char == e->nats_per_char ? strf(",%.9g", e->nats_per_char / M_LN2) : ",";
        if (progress_.step)
            s += strf(",%.9g,%.9g,%.2f,%.1f", r.norm, r.lr, r.seconds * 1e3, o_.total_batch_size / r.seconds);
        else s += ",,,,";
        log_line(*csv_, s + "," + (first_row_ ? version_ : ""));
        first_row_ = false;
    }

    // Writes a poem. If memory has become too short for it, training goes on.
    void sample() try {
        end_line();
        if (!decoder_) decoder_ = std::make_unique<Decoder>(*model_, 1, T_);
        SampleOptions so;
        so.temperature = o_.temperature, so.below = tokenizer_->first_tag(), so.prefix = prompt_.tags();
        Utf8Stream stream;
        printf("\n--- a poem after step %d ---\n%s", progress_.step, prompt_.text.c_str());
        generate(*decoder_, 1, prompt_.tokens, cfg_.V, tokenizer_->eot(), o_.sample_tokens,
                 o_.seed + (uint64_t)progress_.step, so, [&](size_t, int token) {
                     fputs(stream.feed(tokenizer_->bytes(token)).c_str(), stdout);
                     show();
                 });
        printf("\n---\n");
        show();
    } catch (const Error& e) {
        printf("\nno poem after step %d: %s\n", progress_.step, e.what());
        show();
    }

    // model.bin. A model that was the best of validations on other tokens moves to OUT/previous.
    void save_best() {
        if (!best_counts() && file_exists(o_.out + "/model.bin"))
            printf("model.bin was the best by the earlier validations; it is now %s\n",
                   set_aside(o_.out, "model.bin").c_str());
        save_model(*model_, folder_.dir() + "/model.bin");
    }

    RunRecord run_record() const { return {progress_, settings_text_, version_, fingerprints_}; }
    // Of the checkpoint that the run was resumed from, with what has changed since.
    void rewrite_state() {
        StateReader(numbered(folder_.dir(), "state", progress_.step)).rewrite(run_record(), params_checksum_);
    }

    // A checkpoint, and whatever follows from there being one. Rank 0 does it; all ranks come where the model
    // is sharded.
    void save() {
        progress_.position = train_loader_->position();
        progress_.losses = losses_.text(), progress_.norms = norms_.text();
        if (session_steps_) save_checkpoint();
        else if (comm_->leads()) rewrite_state();
        if (!comm_->leads()) return;
        // Without validations the last model is the best known; but it never replaces one that was measured.
        if (!file_exists(folder_.dir() + "/model.bin") || (!validates() && progress_.best_step < 0))
            save_best();
        take_place();
        std::vector<int> steps = checkpoints_in(o_.out);
        for (size_t i = 0; i + (size_t)o_.keep < steps.size(); i++) remove_checkpoint(o_.out, steps[i]);
        remove_stray_shards(o_.out);
    }
    // First the shards, then the model, last the state: until it is there, there is no checkpoint.
    void save_checkpoint() {
        const int step = progress_.step;
        const std::string dir = folder_.dir(), model = numbered(dir, "model", step),
                          state = numbered(dir, "state", step);
        try {
            const std::vector<uint64_t> shards = model_->sharded() ? save_shards() : std::vector<uint64_t>();
            if (!comm_->leads()) return;
            save_model(*model_, model);
            if (shards.empty())
                save_state(*model_, progress_, settings_text_, state, version_, fingerprints_);
            else save_sharded_state(run_record(), model_checksum(*model_), shards, state);
        } catch (...) {
            if (comm_->leads() && !file_exists(state))  // half a checkpoint is none
                unlink(model.c_str()), remove_stray_shards(dir);
            throw;
        }
    }
    // Each rank saves its shard where rank 0 saves. Returns their checksums. If one rank cannot, all fail.
    std::vector<uint64_t> save_shards() {
        std::string dir = std::filesystem::absolute(folder_.dir());
        comm_->broadcast(dir);
        const ShardOf mine = {progress_.step, comm_->rank, comm_->world};
        struct Reason {
            char text[1024];
        } reason = {};
        uint64_t checksum = 0;
        try {
            checksum = save_shard(*model_, mine, dir);
        } catch (const std::bad_alloc&) {
            snprintf(reason.text, sizeof reason.text, "out of memory");
        } catch (const std::exception& e) {
            snprintf(reason.text, sizeof reason.text, "%s", e.what());
        }
        const std::vector<int> failed = comm_->gather((int)(reason.text[0] != 0));
        const size_t r = (size_t)(std::find(failed.begin(), failed.end(), 1) - failed.begin());
        if (r < failed.size())
            fail("%s%s", (int)r == comm_->rank ? "" : strf("rank %zu: ", r).c_str(),
                 comm_->gather(reason)[r].text);
        const std::vector<uint64_t> checksums = comm_->gather(checksum);
        if (comm_->leads()) find_shards(dir, checksums);
        return checksums;
    }
    // Fails where --out is not one folder for all ranks. A network's file system may show a file late.
    void find_shards(const std::string& dir, const std::vector<uint64_t>& checksums) const {
        for (int r = 0; r < comm_->world; r++) {
            const ShardOf shard = {progress_.step, r, comm_->world};
            const std::string path = shard.path(dir);
            for (int tries = 0; tries < 600 && !file_exists(path); tries++) usleep(100000);
            if (!file_exists(path))
                fail(
                    "%s: rank %d has written it, but rank 0 does not see it; wanted an --out on a disk that "
                    "all ranks share",
                    path.c_str(), r);
            ShardReader(dir, shard, checksums[(size_t)r]);
        }
    }

    static constexpr const char* CSV_HEADER =
        "step,train_loss,smoothed_loss,val_loss,val_bits_per_char,grad_norm,lr,ms,tokens_per_s,program\n";

    // The numbers that the model can compute with.
    static std::string numbers() {
        std::string s;
        for (auto [dtype, name] :
             {std::pair<Dtype, const char*>{FP32, "fp32"}, std::pair<Dtype, const char*>{BF16, "bf16"}})
            try {
                Model::check_precision({dtype, true});
                s += std::string(s.empty() ? "" : " and ") + name;
            } catch (const UsageError&) {}
        return s;
    }

    std::unique_ptr<Comm> comm_;
    const std::string version_ = version_text(Model::PROGRAM, numbers());
    Flags flags_;
    Options o_;
    Config cfg_;
    size_t B_ = 0, T_ = 0, micro_steps_ = 1;
    MemoryNeed need_;
    Precision precision_;
    std::unique_ptr<Tokenizer> tokenizer_;
    Prompt prompt_;  // of the sample poems
    std::unique_ptr<ModelReader> checkpoint_;
    std::unique_ptr<TokenFile> train_file_, val_file_;
    std::unique_ptr<TrainLoader> train_loader_;
    std::unique_ptr<EvalLoader> val_loader_;
    std::unique_ptr<Model> model_;
    std::unique_ptr<Decoder> decoder_;
    std::unique_ptr<LogFile> csv_, log_;
    std::vector<int> x_, y_;
    Progress progress_;
    Outliers losses_, norms_;
    StepSettings step_settings_[2];  // of the last two steps that were started
    RunFolder folder_;
    Fingerprints fingerprints_;
    int val_tokens_before_ = -1;            // the resumed run's --val_tokens
    bool save_soon_ = false;                // a checkpoint after this step's validation, though none is due
    std::vector<std::string> changed_;      // flags of this command line that differ from the resumed run's
    std::string settings_text_, log_full_;  // log_full_: why a log could not be written
    uint64_t params_checksum_ = 0;          // of the model file that was loaded
    double peak_ = 1, session_seconds_ = 0, clock_ = 0;
    int session_steps_ = 0, started_ = 0;  // steps that were started; progress_.step of them are recorded
    bool open_line_ = false, first_row_ = true;
};

}  // namespace trainer

// A trainer's main: everything from the command line to the last poem.
template <class Model, class Decoder>
int train(int argc, char** argv) {
    return run_main(Model::PROGRAM, [&] { return trainer::Run<Model, Decoder>(argc, argv).main(); });
}
