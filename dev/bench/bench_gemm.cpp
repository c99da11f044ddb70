// bench_gemm.cpp - times lib/gemm.h's matrix products in comparison with oneDNN's and
// OpenBLAS's: make bench-gemm
//
// The three products of a linear layer with X (M,K), W (N,K), Y (M,N), all row-major, are
//     Y = X W^T + b      dX = dY W      dW += dY^T X
// All libraries get the same arrays, pack them at every call, and alternate: A B C A B C ... With --copies
// each call uses other arrays, so that they come from memory, as in a training step. The machine's peak rate
// is measured in each round, because clocks and the load of other programs change within a minute. The
// figures are medians; shares of the peak and ratios compare measurements of the same round. In bf16 the
// operands are bf16 and the result is fp32. OpenBLAS adds no bias. All libraries share one pool of OpenMP
// threads, so only OpenBLAS's OpenMP build can take part.
#include "bench.h"
#include "lib/flags.h"
#include "lib/gemm_internal.h"
#include "lib/rng.h"

#include <array>
#include <memory>

#ifdef HAVE_DNNL
#include <dnnl.hpp>
#endif
#ifdef HAVE_OPENBLAS
#include <cblas.h>
#endif

namespace {

using bench::Samples;
using Call = std::function<void()>;

enum Form { FORWARD, DX, DW };
const char* const FORM_NAME[] = {"Y=XW'+b", "dX=dYW", "dW+=dY'X"};
enum Who { OURS, ONEDNN, OPENBLAS, OURS_BF16, ONEDNN_BF16, CONTESTANTS };
const char* const WHO_NAME[] = {"ours", "oneDNN", "OpenBLAS", "ours", "oneDNN"};
bool is_bf16(int who) { return who >= OURS_BF16; }
Who ours_like(int who) { return is_bf16(who) ? OURS_BF16 : OURS; }

struct Shape {
    size_t M, K, N;
    const char* what;
};
// The products of GPT-2 124M and of the character model, and small and odd sizes.
const Shape SHAPES[] = {
    {256, 768, 2304, "124m"},   {256, 768, 768, "124m"},   {256, 768, 3072, "124m"},
    {256, 3072, 768, "124m"},   {256, 768, 50304, "124m"}, {1024, 768, 2304, "124m"},
    {1024, 768, 768, "124m"},   {1024, 768, 3072, "124m"}, {1024, 3072, 768, "124m"},
    {1024, 768, 50304, "124m"}, {4096, 384, 1152, "char"}, {4096, 384, 384, "char"},
    {4096, 384, 1536, "char"},  {4096, 1536, 384, "char"}, {4096, 384, 64, "char"},
    {37, 64, 37, "small"},      {64, 64, 64, "small"},     {37, 768, 768, "small"},
    {148, 128, 64, "small"},    {100, 300, 200, "small"},  {255, 767, 769, "small"},
};

// The same random values in [-1, 1) as an fp32 and a bf16 array.
struct Array {
    size_t n;
    float* f;
    uint16_t* h;
    Array(size_t n_, uint32_t stream)
        : n(n_),
          f((float*)machine::allocate(n * 4, "benchmark")),
          h((uint16_t*)machine::allocate(n * 2, "benchmark")) {
        rng::Key key(1, stream, rng::SAMPLE);
#pragma omp parallel for schedule(static)
        for (size_t i = 0; i < n; i++)
            f[i] = (float)(int32_t)key.u32(i) * 0x1p-31f, h[i] = float_to_bf16(f[i]);
    }
    ~Array() { machine::release(f, n * 4), machine::release(h, n * 2); }
    Array(const Array&) = delete;
    Array& operator=(const Array&) = delete;
};

// A product in a form from which all interfaces are called: C (m,n) = A (m,k) B (k,n), with element A(i,k) at
// A[i*am + k*ak].
struct Product {
    size_t m, n, k, am, ak, bk, bn;
    const Array *A, *B;
    float* C;
    const float* bias;
    bool accumulate;
};

template <class T>
Call ours(Dtype dtype, const Product& p, const T* A, const T* B) {
    gemm::Start start = p.accumulate ? gemm::ACCUMULATE : gemm::OVERWRITE;
    gemm::Product product = {p.m, p.n, p.k, {A, p.am, p.ak}, {B, p.bk, p.bn}, p.C, p.n, start, p.bias};
    return [=] { gemm::multiply(dtype, product); };
}

Call onednn([[maybe_unused]] const Product& p, [[maybe_unused]] bool bf16) {
#ifdef HAVE_DNNL
    using namespace dnnl;
    typedef memory::dim D;
    static engine cpu(engine::kind::cpu, 0);
    static stream stream_(cpu);
    auto type = bf16 ? memory::data_type::bf16 : memory::data_type::f32;
    memory::desc a({(D)p.m, (D)p.k}, type, memory::dims{(D)p.am, (D)p.ak}),
        b({(D)p.k, (D)p.n}, type, memory::dims{(D)p.bk, (D)p.bn});
    memory::desc c({(D)p.m, (D)p.n}, memory::data_type::f32, memory::dims{(D)p.n, 1}),
        bias({1, (D)p.n}, memory::data_type::f32, memory::dims{(D)p.n, 1});
    primitive_attr attr;
    if (p.accumulate) {
        post_ops ops;
        ops.append_sum(1.0f);
        attr.set_post_ops(ops);
    }
#if DNNL_VERSION_MAJOR >= 3
    auto pd = p.bias ? matmul::primitive_desc(cpu, a, b, bias, c, attr)
                     : matmul::primitive_desc(cpu, a, b, c, attr);
#else
    auto pd = matmul::primitive_desc(p.bias ? matmul::desc(a, b, bias, c) : matmul::desc(a, b, c), attr, cpu);
#endif
    matmul product(pd);
    auto at = [](const memory::desc& d, const void* data) { return memory(d, cpu, const_cast<void*>(data)); };
    std::unordered_map<int, memory> args = {{DNNL_ARG_SRC, at(a, bf16 ? (void*)p.A->h : p.A->f)},
                                            {DNNL_ARG_WEIGHTS, at(b, bf16 ? (void*)p.B->h : p.B->f)},
                                            {DNNL_ARG_DST, at(c, p.C)}};
    if (p.bias) args.insert({DNNL_ARG_BIAS, at(bias, p.bias)});
    return [=] { product.execute(stream_, args), stream_.wait(); };
#else
    return nullptr;
#endif
}

Call openblas([[maybe_unused]] const Product& p) {
#ifdef HAVE_OPENBLAS
    auto trans = [](size_t inner) { return inner == 1 ? CblasNoTrans : CblasTrans; };
    int lda = (int)std::max(p.am, p.ak), ldb = (int)std::max(p.bk, p.bn);
    return [=] {
        cblas_sgemm(CblasRowMajor, trans(p.ak), trans(p.bn), (int)p.m, (int)p.n, (int)p.k, 1, p.A->f, lda,
                    p.B->f, ldb, p.accumulate ? 1.0f : 0.0f, p.C, (int)p.n);
    };
#else
    return nullptr;
#endif
}

// GFLOP/s of each contestant, its share of the peak, and our rate divided by it. distance is the largest
// relative L2 distance of a result from ours, to be sure that all compute the same.
struct Result {
    Samples gflops[CONTESTANTS], share[CONTESTANTS], ours_over[CONTESTANTS];
    double distance = 0;
};

// One set of operands, and each contestant's call for their product.
struct Operands {
    Array A, B, bias, C;
    Product p;
    std::array<Call, CONTESTANTS> call;

    static size_t a_size(const Shape& s, Form form) { return form == FORWARD ? s.M * s.K : s.M * s.N; }
    static size_t b_size(const Shape& s, Form form) { return form == DW ? s.M * s.K : s.N * s.K; }
    static size_t c_size(const Shape& s, Form form) {
        return form == FORWARD ? s.M * s.N : form == DX ? s.M * s.K : s.N * s.K;
    }
    Operands(const Shape& s, Form form)
        : A(a_size(s, form), 1), B(b_size(s, form), 2), bias(s.N, 3), C(c_size(s, form), 4) {
        size_t M = s.M, K = s.K, N = s.N;
        p = form == FORWARD ? Product{M, N, K, K, 1, 1, K, &A, &B, C.f, bias.f, false}
            : form == DX    ? Product{M, K, N, N, 1, K, 1, &A, &B, C.f, nullptr, false}
                            : Product{N, K, M, 1, N, K, 1, &A, &B, C.f, nullptr, true};
        call = {ours(FP32, p, A.f, B.f), onednn(p, false), openblas(p),
                bench::BF16_DOT ? ours(BF16, p, A.h, B.h) : nullptr,
                bench::BF16_DOT ? onednn(p, true) : nullptr};
    }
};

// Runs all contestants on one product, alternately.
Result race(const Shape& s, Form form, int runs, int copies, int threads) {
    std::vector<std::unique_ptr<Operands>> sets;
    for (int i = 0; i < copies; i++) sets.push_back(std::make_unique<Operands>(s, form));
    Result r;
    size_t repeats[CONTESTANTS] = {}, turn = 0;
    std::vector<float> want[2];
    const Product& p = sets[0]->p;
    size_t out = Operands::c_size(s, form);
    for (int who = 0; who < CONTESTANTS; who++) {
        if (!sets[0]->call[who]) continue;
        std::fill(p.C, p.C + out, 0.5f);
        sets[0]->call[who]();
        auto& w = want[is_bf16(who)];
        if (w.empty()) w.assign(p.C, p.C + out);
        double diff = 0, norm = 0;
        for (size_t i = 0; i < out; i++) {
            double c = (double)p.C[i] + (who == OPENBLAS && p.bias ? (double)p.bias[i % s.N] : 0),
                   d = c - (double)w[i];
            diff += d * d, norm += (double)w[i] * w[i];
        }
        r.distance = std::max(r.distance, std::sqrt(diff / norm));
        double t0 = bench::now();
        sets[0]->call[who]();
        repeats[who] = (size_t)std::max(1.0, 4e-3 / (bench::now() - t0));  // a sample takes at least 4 ms
    }
    for (int run = 0; run < runs; run++) {
        double g[CONTESTANTS] = {},
               peak[2] = {bench::fma_flops(threads) / 1e9, bench::bf16_flops(threads) / 1e9};
        for (int who = 0; who < CONTESTANTS; who++) {
            if (!sets[0]->call[who]) continue;
            double t0 = bench::now();
            for (size_t i = 0; i < repeats[who]; i++) sets[turn++ % sets.size()]->call[who]();
            g[who] =
                2e-9 * (double)s.M * (double)s.K * (double)s.N * (double)repeats[who] / (bench::now() - t0);
            r.gflops[who].add(g[who]), r.share[who].add(g[who] / peak[is_bf16(who)]),
                r.ours_over[who].add(g[ours_like(who)] / g[who]);
        }
    }
    return r;
}

struct Options {
    int runs = 9, copies = 1, threads = 0;
    std::string shapes;
};

Options parse_options(int argc, char** argv) {
    Options o;
    Flags f("bench_gemm", "times matrix products");
    f.add("runs", "", &o.runs, "N", "samples of each library, which alternate").range(1, 1e6);
    f.add("shapes", "", &o.shapes, "NAME", "124m, char or small; \"\": all");
    f.add("copies", "", &o.copies, "N",
          "sets of operands, used in turn: 1 stays in the cache; 11 of GPT-2 124M's come from memory")
        .range(1, 1000);
    f.add("threads", "", &o.threads, "N", "threads; 0: first 1, then 2").range(0, 4096);
    f.parse(argc, argv);
    for (const char* v : {"OPENBLAS_CORETYPE", "OPENBLAS_L2_SIZE"})
        if (getenv(v))
            fail("%s=%s makes OpenBLAS use another machine's kernels; unset it (make bench-gemm does)", v,
                 getenv(v));
    return o;
}

void print_peers() {
#if defined(HAVE_DNNL) && defined(HAVE_OPENBLAS)
    printf("peers: oneDNN %d.%d.%d, %s\n", dnnl_version()->major, dnnl_version()->minor,
           dnnl_version()->patch, openblas_get_config());
#endif
#ifndef HAVE_DNNL
    printf("oneDNN: not installed (sudo apt-get install libdnnl-dev)\n");
#endif
#ifndef HAVE_OPENBLAS
    printf("OpenBLAS: not installed (sudo apt-get install libopenblas-openmp-dev)\n");
#endif
}

// Measures the machine's peak on n threads, and prints it and the table's heading.
void print_heading(int n, int runs) {
    Samples fma, dot;
    for (int i = 0; i < 15; i++) fma.add(bench::fma_flops(n) / 1e9), dot.add(bench::bf16_flops(n) / 1e9);
    printf("\n%d thread%s: peak %.0f GFLOP/s fp32 (%.0f to %.0f), ", n, n > 1 ? "s" : "", fma.median(),
           fma.min(), fma.max());
    if (bench::BF16_DOT)
        printf("%.0f bf16 (%.0f to %.0f) at the start\n", dot.median(), dot.min(), dot.max());
    else printf("no bf16 dot product\n");
    printf(
        "GFLOP/s, share of peak, (minimum to maximum of %d); x: our rate over the better peer's\n%5s %5s %5s "
        "%-8s",
        runs, "M", "K", "N", "");
    for (int who = 0; who < CONTESTANTS; who++)
        printf(" | %-24s%s", strf("%s %s", WHO_NAME[who], is_bf16(who) ? "bf16" : "fp32").c_str(),
               who == OPENBLAS || who == ONEDNN_BF16 ? " |    x" : "");
    printf("\n");
}

// Prints one product's row. worst[is_bf16] becomes the smallest x so far.
void print_row(const Shape& s, Form form, const Result& r, double* worst) {
    printf("%5zu %5zu %5zu %-8s", s.M, s.K, s.N, FORM_NAME[form]);
    double x = NAN;
    for (int who = 0; who < CONTESTANTS; who++) {
        const Samples& g = r.gflops[who];
        printf(" | %-24s", g.empty() ? "-"
                                     : strf("%6.1f %3.0f%% (%.0f to %.0f)", g.median(),
                                            100 * r.share[who].median(), g.min(), g.max())
                                           .c_str());
        x = who == ours_like(who) ? NAN : std::fmin(x, r.ours_over[who].median());
        if (who != OPENBLAS && who != ONEDNN_BF16) continue;
        printf(" | %4s", x > 0 ? strf("%4.2f", x).c_str() : "-");
        worst[is_bf16(who)] = std::fmin(worst[is_bf16(who)], x);
    }
    printf("%s\n", r.distance > 1e-3 ? strf("  results differ: %.2g", r.distance).c_str() : "");
    fflush(stdout);
}

}  // namespace

int main(int argc, char** argv) {
    return run_main("bench_gemm", [&]() -> int {
        const int available = std::min(2, omp_get_max_threads());
        const Options o = parse_options(argc, argv);
        print_peers();
        for (int n = o.threads ? o.threads : 1; n <= (o.threads ? o.threads : available); n++) {
            omp_set_num_threads(n);
#ifdef HAVE_OPENBLAS
            openblas_set_num_threads(n);
#endif
            print_heading(n, o.runs);
            double worst[2] = {9, 9};  // fp32, bf16
            for (const Shape& s : SHAPES)
                for (Form form : {FORWARD, DX, DW}) {
                    if (!o.shapes.empty() && o.shapes != s.what) continue;
                    print_row(s, form, race(s, form, o.runs, o.copies, n), worst);
                }
            for (int half = 0; half < 2; half++)
                if (worst[half] < 9)
                    printf("smallest x, %s, %d thread%s: %.2f\n", half ? "bf16" : "fp32", n, n > 1 ? "s" : "",
                           worst[half]);
        }
        return 0;
    });
}
