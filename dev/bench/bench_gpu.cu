// bench_gpu.cu - times training steps on a GPU: forward, backward, clipping and AdamW. `make gpu-check` runs
// it.
//
//     build/device/bench_gpu_bf16 gpt2 gpt2-large      presets of the models to time
//
// The batch is the largest that fits, at most 32 sequences. Prints rows of a Markdown table: medians of 20
// steps after 3 that are not counted. MFU (model FLOPs utilisation) is step_flops() (Kaplan's 6 N per token,
// plus attention's full square) per second, divided by the peak that train_gpt2cu prints.
#define ARAPOET_NO_MAIN
#include <algorithm>
#include <chrono>

#include "train_gpt2.cu"

namespace {

double now() {
    return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

// The largest batch of 32, 16, 8 ... sequences that fits into free memory; 0 where none does.
size_t largest_batch(const Config& c, Precision p) {
    size_t B = 32;
    while (B &&
           gpu::GPT2::memory_need(c, B, (size_t)c.maxT, true, 0, p).total() > gpu::GPT2::memory_available())
        B /= 2;
    return B;
}

void bench(const std::string& preset) {
    constexpr int WARM = 3, TIMED = 20;
    Config c = preset_config(preset);
    Precision precision = {gpu::BUILD_DTYPE, true};
    size_t B = largest_batch(c, precision), T = (size_t)c.maxT;
    const char* dtype = gpu::BUILD_DTYPE == BF16 ? "bf16" : "fp32";
    if (!B) {
        printf("| %s | %s | does not fit | | | | |\n", preset.c_str(), dtype);
        return;
    }
    size_t before = gpu::GPT2::memory_available();
    gpu::GPT2 model(c, B, T, true, 0, precision);
    model.init_weights(1);
    size_t memory = before - gpu::GPT2::memory_available();
    std::vector<int> x(B * T), y(B * T);
    rng::Key key(1, 0, rng::SAMPLE);
    for (size_t i = 0; i < B * T; i++) x[i] = (int)(key.u32(i) % (uint32_t)c.V);
    for (size_t i = 0; i < B * T; i++) y[i] = x[(i + 1) % (B * T)];
    std::vector<double> seconds;
    StepResult r;
    for (int s = 0; s < WARM + TIMED; s++) {
        Pass pass;
        pass.train = true, pass.step = (uint32_t)s, pass.grad_scale = 1.0f / (float)(B * T);
        AdamW a;
        a.grad_clip = 1;
        double t0 = now();
        model.accumulate(x.data(), y.data(), B, T, pass);
        r = model.step(a, (uint32_t)s + 1);
        if (s >= WARM) seconds.push_back(now() - t0);
    }
    if (!r.finite()) fail("%s: the loss after %d steps is not finite", preset.c_str(), WARM + TIMED);
    std::sort(seconds.begin(), seconds.end());
    double t = seconds[seconds.size() / 2];
    printf("| %s | %s | %zu x %zu | %.1f (%.1f to %.1f) | %s | %.1f%% | %s |\n", preset.c_str(), dtype, B, T,
           t * 1e3, seconds.front() * 1e3, seconds.back() * 1e3,
           commas((uint64_t)((double)(B * T) / t)).c_str(),
           100 * step_flops(c, (double)B, (double)T) / t / gpu::GPT2::peak_flops().flops,
           human_bytes((double)memory).c_str());
    fflush(stdout);
}

}  // namespace

int main(int argc, char** argv) {
    return run_main("bench_gpu", [&] {
        gpu::require_gpu();
        for (int i = 1; i < argc; i++) bench(argv[i]);
        return 0;
    });
}
