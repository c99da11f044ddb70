// bench_gpu.cu - times training steps on a GPU, and the kernels in them. dev/gpu_check.py runs it.
//
//     bench_gpu_bf16 --model gpt2 --batches 8,16,32       steps
//     bench_gpu_bf16 --model gpt2 --batches 16 --kernels  kernels, one by one
//     bench_gpu_bf16 --model gpt2 --batches max --switch head_logits=1073741824
//
// Each line of the output is a JSON object, whose "record" says what it holds: "device" comes first, then a
// "speed" or "kernels" for each batch size. Times are in milliseconds, rates per second, memory in bytes.
// Times are taken by CUDA events; a step's is the median of --steps after --warm that are not counted:
//     step_ms      from the end of one step's update to the end of the next one's
//     pass_ms      forward and backward, while the host is ahead of the GPU
//     forward_ms   a pass without gradients; backward_ms is pass_ms without it
//     update_ms    the gradient's norm, and the optimizer
//     host_gap_ms  what is left of a step: the GPU waits for the host
// MFU (model FLOPs utilisation) is a step's FLOPs per second, divided by the peak that train_gpt2cu prints:
// mfu_full counts attention's full square (step_flops), as nanoGPT and PaLM do; mfu_causal only its half, as
// llm.c does.
#define ARAPOET_NO_MAIN
#include <cxxabi.h>
#include <dlfcn.h>

#include <algorithm>
#include <map>

#include "lib/flags.h"
#include "train_gpt2.cu"

namespace {

using gpu::GPT2;

// ---------------------------------------------------------------------------------------------
// Ways to compute the same, and Muon instead of AdamW for the blocks' matrices; --switch NAME=VALUE chooses.
// A new one is a line in this table.

Optimizer optimizer = ADAMW;

size_t number(const std::string& value) {
    char* end;
    const unsigned long long v = strtoull(value.c_str(), &end, 10);
    if (value.empty() || *end || value[0] == '-')
        throw UsageError(strf("--switch: the value is '%s', wanted a whole number", value.c_str()));
    return (size_t)v;
}

// set(value, model) is called before the model is made, with null, and again when it has been made.
struct Switch {
    const char *name, *other;  // other: a value to compare with the default
    void (*set)(const std::string& value, GPT2* model);
} const SWITCHES[] = {
    {"use_graphs", "0",
     [](const std::string& v, GPT2* m) {
         if (m) m->use_graphs = number(v);
     }},
    {"head_logits", "1073741824", [](const std::string& v, GPT2*) { GPT2::head_logits = number(v); }},
    {"five_products", "1", [](const std::string& v, GPT2*) { gpu::switches.five_products = number(v); }},
    {"rows_in_l2", "1", [](const std::string& v, GPT2*) { gpu::switches.rows_in_l2 = number(v); }},
    {"bias_in_kernels", "1", [](const std::string& v, GPT2*) { gpu::switches.bias_in_kernels = number(v); }},
    {"large_head", "1", [](const std::string& v, GPT2*) { gpu::switches.large_head = number(v); }},
    {"late_results", "1", [](const std::string& v, GPT2*) { gpu::switches.late_results = number(v); }},
    {"muon", "1", [](const std::string& v, GPT2*) { optimizer = number(v) ? MUON : ADAMW; }},
};

// Applies "NAME=VALUE"; "" is none.
void apply_switch(const std::string& text, GPT2* model) {
    if (text.empty()) return;
    const size_t equals = text.find('=');
    std::string known;
    for (const Switch& s : SWITCHES) {
        if (text.substr(0, equals) == s.name && equals != std::string::npos)
            return s.set(text.substr(equals + 1), model);
        known += (known.empty() ? "" : ", ") + std::string(s.name);
    }
    throw UsageError(
        strf("--switch: '%s' is not NAME=VALUE with one of the names %s", text.c_str(), known.c_str()));
}

// ---------------------------------------------------------------------------------------------
// A model, and a batch for it

struct Options {
    std::string model = "gpt2", batches = "max", way;
    int seq_len = 0, layers = 0, steps = 20, warm = 5;
    bool kernels = false, list_switches = false, rehearsal = false;
};

Config config(const Options& o) {
    Config c = preset_config(o.rehearsal ? "tiny" : o.model);
    if (o.rehearsal) c.L = c.NH = 2, c.C = 64, c.V = c.Vp = 512, c.maxT = 32;
    if (o.layers) c.L = o.layers;
    return c;
}

constexpr Precision PRECISION = {gpu::BUILD_DTYPE, true};

size_t need(const Config& c, size_t B, size_t T) {
    return GPT2::memory_need(c, B, T, true, 0, PRECISION, {}, optimizer).total();
}

// The batch sizes in "8,16,32"; "max" is the largest of 32, 16, 8 ... that fits into free memory.
std::vector<size_t> batch_sizes(const std::string& text, const Config& c, size_t T) {
    std::vector<size_t> sizes;
    if (text == "max") {
        size_t B = 32;
        while (B > 1 && need(c, B, T) > GPT2::memory_available()) B /= 2;
        return {B};
    }
    for (size_t i = 0, end; i <= text.size(); i = end + 1) {
        end = std::min(text.find(',', i), text.size());
        const int B = atoi(text.substr(i, end - i).c_str());
        if (B < 1 || B > 4096)
            throw UsageError(strf("--batches is '%s', wanted max or numbers from 1 to 4096", text.c_str()));
        sizes.push_back((size_t)B);
    }
    return sizes;
}

// A model, a batch of random tokens, and the steps that are timed.
class Bench {
  public:
    Bench(const Options& o, const Config& c, size_t B, size_t T)
        : before_(GPT2::memory_available()),
          model(c, B, T, true, 0, PRECISION, {}, optimizer),
          x_(B * T),
          y_(B * T) {
        apply_switch(o.way, &model);
        model.init_weights(1);
        memory = before_ - std::min(before_, GPT2::memory_available());
        rng::Key key(1, 0, rng::SAMPLE);
        for (size_t i = 0; i < B * T; i++) x_[i] = (int)(key.u32(i) % (uint32_t)c.V);
        for (size_t i = 0; i < B * T; i++) y_[i] = x_[(i + 1) % (B * T)];
        stall_.allocate(STALL_BYTES);
    }
    // Keeps the GPU busy for one to five milliseconds, so that the host gets ahead of it.
    void stall() {
        for (size_t i = 0; i < STALLS; i++)
            CUDA_CHECK(cudaMemsetAsync(stall_.p, 0, STALL_BYTES, model.stream.stream));
    }
    void pass() {
        Pass pass;
        pass.train = true, pass.step = step_, pass.grad_scale = 1.0f / (float)(model.B * model.T);
        model.accumulate(x_.data(), y_.data(), model.B, model.T, pass);
    }
    void update() {
        StepSettings a;
        a.grad_clip = 1;
        model.step(a, ++step_);
    }
    void evaluate() { model.forward(x_.data(), y_.data(), model.B, model.T); }
    // The last step's loss. Throws Error unless it is a number.
    double loss() {
        const StepResult r = model.last_result();
        if (!r.finite()) fail("the loss after %u steps is not finite", step_);
        return r.loss;
    }

  private:
#ifdef EMULATOR
    static constexpr size_t STALL_BYTES = 1 << 12, STALLS = 1;
#else
    static constexpr size_t STALL_BYTES = 64 << 20, STALLS = 128;
#endif
    size_t before_;

  public:
    GPT2 model;
    size_t memory = 0;  // of the GPU, taken by the model

  private:
    std::vector<int> x_, y_;
    gpu::DeviceMemory stall_;
    uint32_t step_ = 0;
};

// A moment in a stream's work.
struct Mark {
    cudaEvent_t event;
    Mark() { CUDA_CHECK(cudaEventCreate(&event)); }
    ~Mark() { cudaEventDestroy(event); }
    Mark(const Mark&) = delete;
    Mark& operator=(const Mark&) = delete;
    void record(cudaStream_t s) { CUDA_CHECK(cudaEventRecord(event, s)); }
};
double ms_between(const Mark& a, const Mark& b) {
    float ms;
    CUDA_CHECK(cudaEventElapsedTime(&ms, a.event, b.event));
    return ms;
}
double median(std::vector<double> x) {
    std::sort(x.begin(), x.end());
    return x[x.size() / 2];
}

// ---------------------------------------------------------------------------------------------
// Launches, seen through gpu::launch_hook

#ifdef GPU_LAUNCH_HOOK
constexpr bool HOOK = true;

// The function that a kernel's address belongs to, without its arguments: "void gpu::f_kernel<64>".
std::string kernel_name(const void* kernel) {
    const char* symbol = nullptr;
#if !defined(EMULATOR) && CUDART_VERSION >= 12030
    if (cudaFuncGetName(&symbol, kernel) != cudaSuccess) symbol = nullptr, cudaGetLastError();
#endif
    Dl_info info{};
    if (!symbol && dladdr(kernel, &info)) symbol = info.dli_sname;
    if (!symbol) return strf("kernel at %p", kernel);
    int status;
    char* readable = abi::__cxa_demangle(symbol, nullptr, nullptr, &status);
    std::string name = readable ? readable : symbol;
    free(readable);
    return name.substr(0, name.find('('));
}

// The launches of one step, each between two marks. Marks are used again in the next step.
struct Launches {
    struct Launch {
        const void* kernel;
        const char* product;
        std::unique_ptr<Mark> start = std::make_unique<Mark>(), end = std::make_unique<Mark>();
    };
    std::vector<Launch> all;
    size_t used = 0;
    static inline Launches* recording = nullptr;

    static void on_launch(const void* kernel, const char* product, cudaStream_t s, bool before) {
        Launches& l = *recording;
        if (before && l.used == l.all.size()) l.all.emplace_back();
        Launch& launch = l.all[l.used];
        launch.kernel = kernel, launch.product = product;
        (before ? launch.start : launch.end)->record(s);
        if (!before) l.used++;
    }
    Launches() { recording = this, gpu::launch_hook = on_launch; }
    ~Launches() { gpu::launch_hook = nullptr; }
};

void time_kernels(const Options& o, const Config& c, size_t B, size_t T) {
    struct Sum {
        size_t launches = 0;
        double ms = 0;
    };
    Bench bench(o, c, B, T);
    bench.model.use_graphs = false;
    std::map<std::string, Sum> sums;
    std::map<const void*, std::string> names;
    std::vector<double> step_ms;
    Mark begun;
    Launches launches;
    for (int s = 0; s < o.warm + o.steps; s++) {
        launches.used = 0;
        bench.stall(), begun.record(bench.model.stream.stream);
        bench.pass(), bench.update();
        bench.loss();  // waits
        if (s < o.warm) continue;
        for (size_t i = 0; i < launches.used; i++) {
            const Launches::Launch& l = launches.all[i];
            if (l.kernel && !names.count(l.kernel)) names[l.kernel] = kernel_name(l.kernel);
            Sum& sum = sums[l.product ? l.product : names[l.kernel]];
            sum.launches++, sum.ms += ms_between(*l.start, *l.end);
        }
        step_ms.push_back(ms_between(begun, *launches.all[launches.used - 1].end));
    }
    printf("{\"record\": \"kernels\", \"model\": \"%s\", \"batch\": %zu, \"seq_len\": %zu, \"step_ms\": %.4f",
           o.model.c_str(), B, T, median(step_ms));
    printf(", \"layers\": %d, \"heads\": %d, \"channels\": %d, \"vocabulary\": %d, \"kernels\": [", c.L, c.NH,
           c.C, c.Vp);
    const char* comma = "";
    for (auto& [name, sum] : sums) {
        printf("%s{\"name\": \"%s\", \"launches\": %zu, \"ms\": %.5f}", comma, name.c_str(),
               sum.launches / (size_t)o.steps, sum.ms / o.steps);
        comma = ", ";
    }
    printf("]}\n");
}

// A mark at the end of the last kernel that is launched, which is the optimizer's.
void mark_update(Bench& bench, Mark& end) {
    static Mark* at;
    at = &end;
    gpu::launch_hook = [](const void* kernel, const char*, cudaStream_t s, bool before) {
        if (kernel && !before) at->record(s);
    };
    bench.update();
    gpu::launch_hook = nullptr;
}
#else
constexpr bool HOOK = false;
void time_kernels(const Options&, const Config&, size_t, size_t) {
    fail("--kernels: train_gpt2.cu has no launch_hook");
}
// A mark after the step's result has come to the host.
void mark_update(Bench& bench, Mark& end) { bench.update(), end.record(bench.model.stream.stream); }
#endif

// ---------------------------------------------------------------------------------------------
// Steps

struct Times {
    std::vector<double> step, pass, forward, update;
};

// The whole step, as the trainer takes it.
void time_steps(const Options& o, Bench& bench, Times& t) {
    std::vector<Mark> ends((size_t)(o.warm + o.steps));
    for (Mark& end : ends) bench.pass(), mark_update(bench, end);
    bench.loss();
    for (size_t i = (size_t)o.warm; i < ends.size(); i++) t.step.push_back(ms_between(ends[i - 1], ends[i]));
}
// Its parts, with a host that is ahead of the GPU.
void time_parts(const Options& o, Bench& bench, Times& t) {
    cudaStream_t s = bench.model.stream.stream;
    Mark begun, passed, updated, evaluated;
    bench.evaluate();  // records its graph
    for (int i = 0; i < std::max(3, o.steps / 2); i++) {
        bench.stall(), begun.record(s);
        bench.pass(), passed.record(s);
        mark_update(bench, updated);
        bench.loss();
        t.pass.push_back(ms_between(begun, passed)), t.update.push_back(ms_between(passed, updated));
        bench.stall(), begun.record(s);
        bench.evaluate(), evaluated.record(s);
        CUDA_CHECK(cudaEventSynchronize(evaluated.event));
        t.forward.push_back(ms_between(begun, evaluated));
    }
}

void time_speed(const Options& o, const Config& c, size_t B, size_t T) {
    Bench bench(o, c, B, T);
    Times t;
    time_steps(o, bench, t), time_parts(o, bench, t);
    const double tokens = (double)(B * T), step = median(t.step), pass = median(t.pass),
                 forward = median(t.forward), update = median(t.update), peak = GPT2::peak_flops().flops,
                 full = step_flops(c, (double)B, (double)T),
                 causal = full - 6.0 * c.L * c.C * (double)T * tokens;
    auto [least, most] = std::minmax_element(t.step.begin(), t.step.end());
    printf("{\"record\": \"speed\", \"model\": \"%s\", \"batch\": %zu, \"seq_len\": %zu, \"switch\": \"%s\"",
           o.model.c_str(), B, T, o.way.c_str());
    printf(", \"steps\": %d, \"step_ms\": %.4f, \"step_ms_least\": %.4f, \"step_ms_most\": %.4f", o.steps,
           step, *least, *most);
    printf(", \"pass_ms\": %.4f, \"forward_ms\": %.4f, \"backward_ms\": %.4f, \"update_ms\": %.4f", pass,
           forward, pass - forward, update);
    printf(", \"host_gap_ms\": %.4f, \"tokens_per_s\": %.1f, \"mfu_full\": %.6g, \"mfu_causal\": %.6g",
           step - pass - update, tokens / step * 1e3, full / step * 1e3 / peak, causal / step * 1e3 / peak);
    printf(", \"memory\": %zu, \"loss\": %.6f}\n", bench.memory, bench.loss());
}

// ---------------------------------------------------------------------------------------------
// The device, and main

// Bytes a second of the GPU's memory, from its clock and the width of its bus.
double bandwidth() {
#ifdef EMULATOR
    return 1e11;  // any number: a rehearsal needs one
#else
    int khz = 0, bits = 0;
    CUDA_CHECK(cudaDeviceGetAttribute(&khz, cudaDevAttrMemoryClockRate, gpu::device_number()));
    CUDA_CHECK(cudaDeviceGetAttribute(&bits, cudaDevAttrGlobalMemoryBusWidth, gpu::device_number()));
    return 2e3 * khz * bits / 8;
#endif
}

void print_device() {
    const cudaDeviceProp d = gpu::device_properties();
    const Peak peak = GPT2::peak_flops();
    int driver = 0, runtime = 0;
    CUDA_CHECK(cudaDriverGetVersion(&driver));
    CUDA_CHECK(cudaRuntimeGetVersion(&runtime));
    printf("{\"record\": \"device\", \"name\": \"%s\", \"compute_capability\": \"%d.%d\", \"memory\": %zu",
           d.name, d.major, d.minor, d.totalGlobalMem);
    printf(", \"multiprocessors\": %d, \"driver_cuda\": \"%d.%d\", \"runtime_cuda\": \"%d.%d\"",
           d.multiProcessorCount, driver / 1000, driver % 1000 / 10, runtime / 1000, runtime % 1000 / 10);
    printf(", \"cublaslt\": \"%zu\", \"peak_flops\": %.4e, \"peak_source\": \"%s\", \"bandwidth\": %.4e",
           cublasLtGetVersion(), peak.flops, peak.source.c_str(), bandwidth());
    printf(", \"numbers\": \"%s\", \"hook\": %s}\n", gpu::BUILD_DTYPE == BF16 ? "bf16" : "fp32",
           HOOK ? "true" : "false");
    fflush(stdout);
}

int bench_gpu(const Options& o) {
    if (o.list_switches) {
        for (const Switch& s : SWITCHES) printf("%s=%s\n", s.name, s.other);
        return 0;
    }
    apply_switch(o.way, nullptr);
    gpu::require_gpu();
    print_device();
    const Config c = config(o);
    const size_t T = o.seq_len && !o.rehearsal ? (size_t)o.seq_len : (size_t)c.maxT;
    for (size_t B : batch_sizes(o.batches, c, T)) {
        const size_t needed = need(c, B, T), available = GPT2::memory_available();
        if (needed > available)
            printf(
                "{\"record\": \"does not fit\", \"model\": \"%s\", \"batch\": %zu, \"needs\": %zu, "
                "\"available\": %zu}\n",
                o.model.c_str(), B, needed, available);
        else if (o.kernels) time_kernels(o, c, B, T);
        else time_speed(o, c, B, T);
        fflush(stdout);
    }
    return 0;
}

}  // namespace

int main(int argc, char** argv) {
    return run_main("bench_gpu", [&] {
        Options o;
        Flags f("bench_gpu", "times training steps on a GPU, and the kernels in them");
        f.section("What");
        f.add("model", "", &o.model, "NAME", "sizes").choices(preset_names());
        f.add("layers", "", &o.layers, "L", "layers, instead of the model's; 0: the model's").range(0, 4096);
        f.add("batches", "", &o.batches, "LIST",
              "sequences at once, as in 8,16,32; max: what fits, up to 32");
        f.add("seq_len", "", &o.seq_len, "T", "tokens of a sequence; 0: the model's").range(0, 1 << 20);
        f.add("switch", "", &o.way, "NAME=VALUE", "another way to compute the same");
        f.add("list_switches", "", &o.list_switches,
              "print each switch with a value to try, and nothing else");
        f.section("How");
        f.add("kernels", "", &o.kernels, "time each kernel, launched without graphs");
        f.add("steps", "", &o.steps, "N", "steps that are timed").range(1, 10000);
        f.add("warm", "", &o.warm, "N", "steps before those").range(1, 10000);
        f.add("rehearsal", "", &o.rehearsal, "a model that is as small as possible, whatever --model says");
        f.parse(argc, argv);
        return bench_gpu(o);
    });
}
