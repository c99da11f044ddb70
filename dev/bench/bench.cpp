// bench.cpp - times the matrix product and whole training steps: make bench
//
//     ./bench gemm                    GFLOP/s of the three products of a linear layer on GPT-2's shapes
//     ./bench step [LAYERS HEADS C V B T]...   a training step: forward, backward, norm, AdamW
// Medians of several runs, after one that is not counted; shares of the peak measured in the same run.
#define ARAPOET_NO_MAIN
#include "train_gpt2.cpp"

namespace {

double now() { return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count(); }

double median(std::vector<double> v) {
    std::sort(v.begin(), v.end());
    return v[v.size() / 2];
}

template <class F>
double median_seconds(int runs, F f) {
    f();
    std::vector<double> v;
    for (int i = 0; i < runs; i++) {
        double t0 = now();
        f();
        v.push_back(now() - t0);
    }
    return median(v);
}

void bench_gemm(double peak) {
    printf("%5s %5s %6s  GFLOP/s (share of peak %.0f): forward, dX, dW\n", "M", "K", "N", peak / 1e9);
    const size_t shapes[][2] = {{768, 2304}, {768, 768}, {768, 3072}, {3072, 768}, {768, 50304}, {384, 1152}, {384, 1536}, {384, 64}};
    for (size_t M : {256, 1024})
        for (auto& s : shapes) {
            size_t K = s[0], N = s[1];
            float *X = (float*)gemm::allocate(M * K * 4, "X"), *W = (float*)gemm::allocate(N * K * 4, "W"), *Y = (float*)gemm::allocate(M * N * 4, "Y");
            for (size_t i = 0; i < M * K; i++) X[i] = (float)(i % 97) * 0.01f;
            for (size_t i = 0; i < N * K; i++) W[i] = (float)(i % 89) * 0.01f;
            double flops = 2.0 * (double)M * (double)K * (double)N, t[3] = {
                median_seconds(7, [&] { gemm::multiply(M, N, K, X, K, 1, W, 1, K, Y, N); }),
                median_seconds(7, [&] { gemm::multiply(M, K, N, Y, N, 1, W, K, 1, X, K); }),
                median_seconds(7, [&] { gemm::multiply(N, K, M, Y, 1, N, X, K, 1, W, K); })};
            printf("%5zu %5zu %6zu ", M, K, N);
            for (double s : t) printf(" %7.1f (%.0f%%)", flops / s / 1e9, 100 * flops / s / peak);
            printf("\n");
            gemm::release(X, M * K * 4), gemm::release(W, N * K * 4), gemm::release(Y, M * N * 4);
        }
}

void bench_step(double peak, int L, int NH, int C, int V, size_t B, size_t T) {
    Config c;
    c.L = L, c.NH = NH, c.C = C, c.V = V, c.Vp = pad_vocab(V), c.maxT = (int)T;
    cpu::GPT2 model(c, B, T, true);
    model.init_weights(1);
    std::vector<int> x(B * T), y(B * T);
    for (size_t i = 0; i < B * T; i++) x[i] = (int)(rng::Key(1, 0, rng::SAMPLE).u32(i) % (uint32_t)V), y[i] = (x[i] * 7 + 1) % V;
    std::vector<double> fwd, bwd, opt, all;
    for (uint32_t s = 0; s < 6; s++) {
        Pass pass;
        pass.train = true, pass.step = s, pass.grad_scale = 1.0f / (float)(B * T);
        double t0 = now();
        model.forward(x.data(), y.data(), B, T, pass);
        double t1 = now();
        model.backward();
        double t2 = now(), norm = model.grad_norm();
        model.update(AdamW(), s + 1, norm > 1 ? (float)(1 / norm) : 1.0f);
        double t3 = now();
        if (s) fwd.push_back(t1 - t0), bwd.push_back(t2 - t1), opt.push_back(t3 - t2), all.push_back(t3 - t0);
    }
    double t = median(all);
    printf("L%d H%d C%d V%d B%zu T%zu: step %.0f ms (forward and head %.0f, backward %.0f, AdamW %.0f), %.0f tokens/s, %.1f GFLOP/s, %.0f%% of peak\n",
           L, NH, C, V, B, T, t * 1e3, median(fwd) * 1e3, median(bwd) * 1e3, median(opt) * 1e3, (double)(B * T) / t,
           step_flops(c, (double)B, (double)T) / t / 1e9, 100 * step_flops(c, (double)B, (double)T) / t / peak);
    fflush(stdout);
}

}  // namespace

int main(int argc, char** argv) {
    gemm::spin_less(argv);
    return run_main("bench", [&] {
        std::string what = argc > 1 ? argv[1] : "all";
        double peak = gemm::measure_peak_flops();
        printf("%s, peak %.0f GFLOP/s\n", cpu::GPT2::device().c_str(), peak / 1e9);
        if (what == "gemm" || what == "all") bench_gemm(peak);
        if (what != "step" && what != "all" && what != "gemm") throw UsageError("usage: ./bench [gemm | step [L NH C V B T]]");
        if (what == "step" && argc == 8) {
            bench_step(peak, atoi(argv[2]), atoi(argv[3]), atoi(argv[4]), atoi(argv[5]), (size_t)atoi(argv[6]), (size_t)atoi(argv[7]));
        } else if (what != "gemm") {
            bench_step(peak, 12, 12, 768, 50257, 4, 64);
            bench_step(peak, 6, 6, 384, 64, 16, 256);
            bench_step(peak, 4, 4, 128, 40, 16, 64);
        }
        return 0;
    });
}
