// count_step.cu - counts, in the emulator, the launches of a training step and the bytes of device memory
// that each kernel reads and writes. dev/bench/test_roofline.py compares them with roofline.py.
//
//     build/count_step_emu --layers 2 --heads 2 --channels 64 --batch 4 --seq_len 64 --vocabulary 300
//
// The output is a JSON object: the shapes, the most logits held at once, and for each kernel, product or
// memset its launches in the step, and the bytes read and written, each byte once for each launch
// (dev/emulator/accesses.h).
#define ARAPOET_NO_MAIN
#include <dlfcn.h>

#include <map>

#include "dev/emulator/accesses.h"
#include "dev/emulator/runtime.h"
#include "lib/flags.h"
#include "train_gpt2.cu"

namespace {

struct Sum {
    size_t launches = 0, read = 0, written = 0;
};
std::map<std::string, Sum>* sums = nullptr;  // null: nothing is counted

void add(const std::string& name, size_t read, size_t written) {
    Sum& s = (*sums)[name];
    s.launches++, s.read += read, s.written += written;
}
void on_launch(const void* kernel, const char* product, cudaStream_t, bool before) {
    if (!sums) return;
    if (before) return emu::start_counting();
    const emu::Accesses a = emu::stop_counting();
    static std::map<const void*, std::string> names;  // finding a name takes longer than a launch
    if (kernel && !names.count(kernel)) names[kernel] = emu::name_of(kernel);
    add(product ? product : names[kernel], a.read, a.written);
}

struct Sizes {
    Config config = preset_config("tiny");
    size_t B = 4, T = 64;
    int micro_steps = 1;
};

// From the flags, some of which set the trainer's switches.
Sizes parse(int argc, char** argv) {
    int layers = 2, heads = 2, channels = 64, batch = 4, seq_len = 64, vocabulary = 300, head_logits = 0;
    Sizes s;
    Flags f("count_step", "counts the launches and the memory traffic of a training step in the emulator");
    f.add("layers", "", &layers, "L", "layers").range(1, 100);
    f.add("heads", "", &heads, "NH", "heads").range(1, 100);
    f.add("channels", "", &channels, "C", "channels").range(1, 4096);
    f.add("batch", "", &batch, "B", "sequences at once").range(1, 64);
    f.add("seq_len", "", &seq_len, "T", "tokens of a sequence").range(1, 4096);
    f.add("vocabulary", "", &vocabulary, "V", "at least B T, for the tokens are all different")
        .range(1, 1 << 20);
    f.add("micro_steps", "", &s.micro_steps, "N", "batches of the step").range(1, 100);
    f.add("head_logits", "", &head_logits, "N", "logits held at once; 0: the trainer's").range(0, 1 << 30);
    f.add("five_products", "", &gpu::switches.five_products, "attention's backward by five products");
    f.add("late_results", "", &gpu::switches.late_results, "step() returns the result of the step before");
    f.parse(argc, argv);
    if (vocabulary < batch * seq_len)
        throw UsageError(strf("--vocabulary %d, wanted at least %d: the tokens of a batch are all different",
                              vocabulary, batch * seq_len));
    if (head_logits) gpu::GPT2::head_logits = (size_t)head_logits;
    Config& c = s.config;
    c.L = layers, c.NH = heads, c.C = channels, c.maxT = seq_len, c.V = vocabulary;
    c.Vp = (int)round_up((size_t)vocabulary, 128);
    s.B = (size_t)batch, s.T = (size_t)seq_len;
    return s;
}

// Takes one step, and returns the launches and bytes by name. The model's constructor does not count.
std::map<std::string, Sum> count_step(const Sizes& s) {
    const size_t M = s.B * s.T;
    gpu::GPT2 model(s.config, s.B, s.T, true, 0, {gpu::BUILD_DTYPE, true});
    model.init_weights(1);
    model.use_graphs = false;
    std::vector<int> x(M), y(M);
    for (size_t i = 0; i < M; i++) x[i] = (int)i, y[i] = (int)((i + 1) % M);
    std::map<std::string, Sum> counted;
    gpu::launch_hook = on_launch, sums = &counted;
    for (int i = 0; i < s.micro_steps; i++) {
        Pass pass;
        pass.train = true, pass.grad_scale = 1.0f / (float)M, pass.last = i + 1 == s.micro_steps;
        model.accumulate(x.data(), y.data(), s.B, s.T, pass);
    }
    StepSettings a;
    a.grad_clip = 1;
    model.step(a, 1);
    sums = nullptr;
    if (!model.last_result().finite()) fail("the loss is not finite");
    return counted;
}

void print(const Sizes& s, const std::map<std::string, Sum>& counted) {
    const Config& c = s.config;
    printf(
        "{\"layers\": %d, \"heads\": %d, \"channels\": %d, \"batch\": %zu, \"seq_len\": %zu, "
        "\"vocabulary\": %d, \"multiprocessors\": %d, \"head_logits\": %zu, \"kernels\": [",
        c.L, c.NH, c.C, s.B, s.T, c.Vp, gpu::multiprocessors(), gpu::GPT2::head_logits);
    const char* comma = "";
    for (auto& [name, sum] : counted) {
        printf("%s{\"name\": \"%s\", \"launches\": %zu, \"read\": %zu, \"written\": %zu}", comma,
               name.c_str(), sum.launches, sum.read, sum.written);
        comma = ", ";
    }
    printf("]}\n");
}

}  // namespace

// The launch hook does not see memsets. This definition is found before the emulator's.
extern "C" cudaError_t cudaMemsetAsync(void* p, int value, size_t bytes, cudaStream_t stream) {
    static const auto emulators = (decltype(&cudaMemsetAsync))dlsym(RTLD_NEXT, "cudaMemsetAsync");
    if (sums) add("memset", 0, bytes);
    return emulators(p, value, bytes, stream);
}

int main(int argc, char** argv) {
    return run_main("count_step", [&] {
        const Sizes sizes = parse(argc, argv);
        emu::options().workers = 1;  // accesses are counted one after the other
        print(sizes, count_step(sizes));
        return 0;
    });
}
