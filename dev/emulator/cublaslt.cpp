// cublaslt.cpp - cuBLASLt's matrix product on the CPU: D = epilogue(alpha op(A) op(B) + beta C).
//
// Supported are A and B in bf16 with C and D in bf16 or fp32, or all in fp32; column order; strided batches;
// and the epilogues that training uses. Each element is summed in fp32 in the order of k, so results are
// reproducible bit for bit. Whatever cuBLASLt's documentation forbids is refused, and so is an operand that
// extends beyond its device allocation; last_report() says why.
#include <cublasLt.h>

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <memory>

#include "api.h"

namespace emu {
namespace {

// The contents of the API's opaque descriptors
struct Product {
    cublasComputeType_t compute;
    cudaDataType_t scale;
    int32_t pointer_mode, trans_a, trans_b, bias_type, aux_type;
    uint32_t epilogue;
    void *bias, *aux;
    int64_t aux_ld, aux_stride, bias_stride;
};
struct Layout {
    cudaDataType_t type;
    int32_t order, batch;
    uint64_t rows, cols;
    int64_t ld, stride;
};
struct Preference {
    uint64_t workspace;
    uint32_t alignment[4];  // of A, B, C, D
    // Further restrictions of the algorithms, which have no effect here
    uint32_t search_mode, reduction_schemes;
    uint64_t implementations;
    float most_waves;
};
// The content of an opaque algorithm. All algorithms give the same results.
struct Algorithm {
    uint64_t id, workspace;
    uint32_t alignment[4];
};
constexpr uint64_t ALGORITHM_ID = 0xa190;
static_assert(sizeof(Algorithm) <= sizeof(cublasLtMatmulAlgo_t), "fits into the opaque algorithm");

size_t size_of(cudaDataType_t t) { return t == CUDA_R_16BF ? 2 : 4; }
float load(const void* p, cudaDataType_t type, size_t i) {
    return type == CUDA_R_16BF ? bit_cast<float>((uint32_t)((const uint16_t*)p)[i] << 16)
                               : ((const float*)p)[i];
}
void store(void* p, cudaDataType_t type, size_t i, float v) {
    if (type == CUDA_R_16BF) ((__nv_bfloat16*)p)[i] = __float2bfloat16_rn(v);
    else ((float*)p)[i] = v;
}

// GELU in the tanh approximation, and its derivative
constexpr float GELU_SCALE = 0.7978845608028654f, GELU_CUBE = 0.044715f;
float gelu(float x) { return 0.5f * x * (1 + tanhf(GELU_SCALE * (x + GELU_CUBE * x * x * x))); }
float gelu_derivative(float x) {
    float t = tanhf(GELU_SCALE * (x + GELU_CUBE * x * x * x));
    return 0.5f * (1 + t) + 0.5f * x * (1 - t * t) * GELU_SCALE * (1 + 3 * GELU_CUBE * x * x);
}

// One product with all its parameters: op(A) (m,k), op(B) (k,n), C and D (m,n).
struct Matmul {
    Product p;
    Layout a, b, c, d;
    const char *A, *B, *C;
    char* D;
    float alpha, beta;
    const float *device_alpha, *device_beta;  // instead of alpha and beta in the device pointer mode
    void* workspace;
    size_t workspace_bytes;
    size_t m, n, k;

    bool writes_aux() const {
        return p.epilogue == CUBLASLT_EPILOGUE_GELU_AUX || p.epilogue == CUBLASLT_EPILOGUE_GELU_AUX_BIAS;
    }
    bool is_gelu() const { return p.epilogue & CUBLASLT_EPILOGUE_GELU; }
    bool is_dgelu() const {
        return p.epilogue == CUBLASLT_EPILOGUE_DGELU || p.epilogue == CUBLASLT_EPILOGUE_DGELU_BGRAD;
    }
    bool has_bias() const { return p.epilogue & CUBLASLT_EPILOGUE_BIAS; }
    bool needs_aux() const { return writes_aux() || is_dgelu(); }
    bool has_bias_gradient() const {
        return p.epilogue == CUBLASLT_EPILOGUE_DGELU_BGRAD || p.epilogue == CUBLASLT_EPILOGUE_BGRADA ||
               p.epilogue == CUBLASLT_EPILOGUE_BGRADB;
    }
    bool needs_bias() const { return has_bias() || has_bias_gradient(); }
    size_t bias_count() const { return p.epilogue == CUBLASLT_EPILOGUE_BGRADB ? n : m; }
};

// ---------------------------------------------------------------------------------------------
// The product: op(A) is packed into panels of MR rows and op(B) into panels of NR columns, both k-major. A
// tile of MR x NR results is summed in registers.

typedef float Vector __attribute__((vector_size(64)));
constexpr size_t VL = 16, MR = 2 * VL, NR = 6;

// tile[j*MR + i] = sum over k of a[k*MR + i] * b[k*NR + j]
__attribute__((noinline)) void multiply_tile(const float* a, const float* b, size_t k, float* tile) {
    Vector low[NR] = {}, high[NR] = {};
    for (; k; k--, a += MR, b += NR) {
        Vector x, y;
        memcpy(&x, a, sizeof x), memcpy(&y, a + VL, sizeof y);
#pragma GCC unroll 6
        for (size_t j = 0; j < NR; j++) low[j] += x * b[j], high[j] += y * b[j];
    }
    for (size_t j = 0; j < NR; j++)
        memcpy(tile + j * MR, &low[j], sizeof low[j]), memcpy(tile + j * MR + VL, &high[j], sizeof high[j]);
}

// Packs element (r, i) = src[r*stride_r + i*stride_i] into panel[i*R + r], for r < rows and i < k; the rows
// from `rows` to R become zeros.
template <size_t R>
void pack(float* panel, const void* src, cudaDataType_t type, size_t stride_r, size_t stride_i, size_t rows,
          size_t k) {
    auto place = [&](size_t r, size_t i) {
        panel[i * R + r] = r < rows ? load(src, type, r * stride_r + i * stride_i) : 0;
    };
    if (stride_r < stride_i) {
        for (size_t i = 0; i < k; i++)
            for (size_t r = 0; r < R; r++) place(r, i);
    } else {
        for (size_t r = 0; r < R; r++)
            for (size_t i = 0; i < k; i++) place(r, i);
    }
}

// Computes the rest of the formula from the sum of element (row, col), and stores the result. Returns the
// result before it is rounded to D's type.
float finish(const Matmul& f, size_t batch, size_t row, size_t col, float sum) {
    const cudaDataType_t type = f.d.type;
    float v = f.alpha * sum;
    if (f.beta != 0) v += f.beta * load(f.C, type, batch * (size_t)f.c.stride + col * (size_t)f.c.ld + row);
    if (f.has_bias()) v += load(f.p.bias, type, batch * (size_t)f.p.bias_stride + row);
    const size_t aux = batch * (size_t)f.p.aux_stride + col * (size_t)f.p.aux_ld + row;
    if (f.writes_aux()) store(f.p.aux, type, aux, v);
    if (f.is_gelu()) v = gelu(v);
    if (f.is_dgelu()) v *= gelu_derivative(load(f.p.aux, type, aux));
    store(f.D, type, batch * (size_t)f.d.stride + col * (size_t)f.d.ld + row, v);
    return v;
}

// Computes the whole product on all workers.
void run(const Matmul& f) {
    const size_t m = f.m, n = f.n, k = f.k, panels_n = (n + NR - 1) / NR;
    // Strides of op(A) and op(B) along their outer dimension (m, n) and along k
    const size_t a_m = f.p.trans_a ? (size_t)f.a.ld : 1, a_k = f.p.trans_a ? 1 : (size_t)f.a.ld;
    const size_t b_n = f.p.trans_b ? 1 : (size_t)f.b.ld, b_k = f.p.trans_b ? (size_t)f.b.ld : 1;
    std::unique_ptr<float[]> packed_b(new float[panels_n * NR * k]);
    for (size_t batch = 0; batch < (size_t)f.d.batch; batch++) {
        const char* A = f.A + batch * (size_t)f.a.stride * size_of(f.a.type);
        const char* B = f.B + batch * (size_t)f.b.stride * size_of(f.b.type);
        auto row_sum = [&](const char* x, cudaDataType_t type, size_t start, size_t stride) {
            double sum = 0;
            for (size_t i = 0; i < k; i++) sum += load(x, type, start + i * stride);
            return (float)sum;
        };
        const size_t bias = batch * (size_t)f.p.bias_stride;
        if (f.p.epilogue == CUBLASLT_EPILOGUE_BGRADA)
            for (size_t i = 0; i < m; i++)
                store(f.p.bias, f.d.type, bias + i, row_sum(A, f.a.type, i * a_m, a_k));
        if (f.p.epilogue == CUBLASLT_EPILOGUE_BGRADB)
            for (size_t i = 0; i < n; i++)
                store(f.p.bias, f.d.type, bias + i, row_sum(B, f.b.type, i * b_n, b_k));
        parallel(panels_n, [&](size_t j) {
            pack<NR>(&packed_b[j * NR * k], B + j * NR * b_n * size_of(f.b.type), f.b.type, b_n, b_k,
                     std::min(NR, n - j * NR), k);
        });
        parallel((m + MR - 1) / MR, [&](size_t i) {
            const size_t row0 = i * MR, rows = std::min(MR, m - row0);
            std::unique_ptr<float[]> packed_a(new float[MR * k]);
            pack<MR>(packed_a.get(), A + row0 * a_m * size_of(f.a.type), f.a.type, a_m, a_k, rows, k);
            float tile[MR * NR];
            double gradient[MR] = {};
            for (size_t j = 0; j < panels_n; j++) {
                multiply_tile(packed_a.get(), &packed_b[j * NR * k], k, tile);
                for (size_t col = j * NR; col < std::min(n, (j + 1) * NR); col++)
                    for (size_t r = 0; r < rows; r++)
                        gradient[r] += finish(f, batch, row0 + r, col, tile[(col - j * NR) * MR + r]);
            }
            if (f.p.epilogue == CUBLASLT_EPILOGUE_DGELU_BGRAD)
                for (size_t r = 0; r < rows; r++)
                    store(f.p.bias, f.d.type, bias + row0 + r, (float)gradient[r]);
        });
    }
}

// ---------------------------------------------------------------------------------------------
// Checking calls: what is supported, and what is valid

struct Refusal {
    cublasStatus_t status;
    std::string why;
};
template <class... A>
void demand(bool condition, cublasStatus_t otherwise, const char* why, A... a) {
    if (condition) return;
    if constexpr (sizeof...(a) > 0) throw Refusal{otherwise, format(why, a...)};
    else throw Refusal{otherwise, why};
}
constexpr cublasStatus_t UNSUPPORTED = CUBLAS_STATUS_NOT_SUPPORTED, INVALID = CUBLAS_STATUS_INVALID_VALUE;
thread_local std::string last_refusal;

// Runs the body of an API function, which throws a Refusal if it fails, and returns the status.
template <class F>
cublasStatus_t status_of(F body) {
    std::lock_guard<std::recursive_mutex> lock(api_lock);
    try {
        body();
        return CUBLAS_STATUS_SUCCESS;
    } catch (const Refusal& r) {
        last_refusal = r.why;
        return r.status;
    }
}

bool known_epilogue(uint32_t e) {
    for (cublasLtEpilogue_t known :
         {CUBLASLT_EPILOGUE_DEFAULT, CUBLASLT_EPILOGUE_BIAS, CUBLASLT_EPILOGUE_GELU,
          CUBLASLT_EPILOGUE_GELU_BIAS, CUBLASLT_EPILOGUE_GELU_AUX, CUBLASLT_EPILOGUE_GELU_AUX_BIAS,
          CUBLASLT_EPILOGUE_DGELU, CUBLASLT_EPILOGUE_DGELU_BGRAD, CUBLASLT_EPILOGUE_BGRADA,
          CUBLASLT_EPILOGUE_BGRADB})
        if ((uint32_t)known == e) return true;
    return false;
}

// The product that the descriptors describe, without addresses; a Refusal if it is not supported or invalid.
Matmul product_of(cublasLtMatmulDesc_t desc, cublasLtMatrixLayout_t a, cublasLtMatrixLayout_t b,
                  cublasLtMatrixLayout_t c, cublasLtMatrixLayout_t d) {
    demand(desc && a && b && c && d, INVALID, "a descriptor is null");
    Matmul f = {};
    f.p = *(Product*)desc, f.a = *(Layout*)a, f.b = *(Layout*)b, f.c = *(Layout*)c, f.d = *(Layout*)d;
    const Product& p = f.p;
    const cudaDataType_t in = f.a.type, out = f.d.type;
    const cublasComputeType_t compute = p.compute;
    const bool fast = compute == CUBLAS_COMPUTE_32F_FAST_TF32 || compute == CUBLAS_COMPUTE_32F_FAST_16BF ||
                      compute == CUBLAS_COMPUTE_32F_FAST_16F;
    demand(fast || compute == CUBLAS_COMPUTE_32F || compute == CUBLAS_COMPUTE_32F_PEDANTIC, UNSUPPORTED,
           "the compute type is not fp32");
    demand(p.scale == CUDA_R_32F, UNSUPPORTED, "the scale type is not fp32");
    demand(f.b.type == in && f.c.type == out && (in == CUDA_R_32F || in == CUDA_R_16BF) &&
               (out == CUDA_R_32F || out == in),
           UNSUPPORTED,
           "the types of A, B, C, D are %d, %d, %d, %d; supported are bf16 to bf16 or fp32, and fp32", in,
           f.b.type, f.c.type, out);
    demand(!fast || in == CUDA_R_32F, UNSUPPORTED, "the FAST compute types are for fp32 matrices");
    demand(known_epilogue(p.epilogue), UNSUPPORTED, "epilogue %u", p.epilogue);
    demand(!(options().refused_epilogues & p.epilogue), UNSUPPORTED, "epilogue %u is switched off",
           p.epilogue);
    demand(p.pointer_mode == CUBLASLT_POINTER_MODE_HOST || p.pointer_mode == CUBLASLT_POINTER_MODE_DEVICE,
           UNSUPPORTED, "the pointer mode of alpha and beta");

    f.m = p.trans_a ? f.a.cols : f.a.rows, f.k = p.trans_a ? f.a.rows : f.a.cols,
    f.n = p.trans_b ? f.b.rows : f.b.cols;
    const size_t k_of_b = p.trans_b ? f.b.cols : f.b.rows;
    demand(f.k == k_of_b && f.d.rows == f.m && f.d.cols == f.n && f.c.rows == f.m && f.c.cols == f.n, INVALID,
           "op(A) is (%zu,%zu), op(B) (%zu,%zu), C (%zu,%zu), D (%zu,%zu)", f.m, f.k, k_of_b, f.n,
           (size_t)f.c.rows, (size_t)f.c.cols, (size_t)f.d.rows, (size_t)f.d.cols);
    const char* name = "ABCD";
    for (const Layout* l : {&f.a, &f.b, &f.c, &f.d}) {
        demand(l->order == CUBLASLT_ORDER_COL, UNSUPPORTED, "%c is not in column order", *name);
        demand(l->rows && l->cols, INVALID, "%c is empty", *name);
        demand(l->ld >= (int64_t)l->rows, INVALID, "%c has leading dimension %ld, less than its %zu rows",
               *name, (long)l->ld, (size_t)l->rows);
        demand(l->batch == f.d.batch && l->batch >= 1, INVALID, "%c has %d batches, D has %d", *name,
               l->batch, f.d.batch);
        name++;
    }
    if (f.needs_aux()) {
        demand(p.aux_type < 0 || p.aux_type == (int)out, UNSUPPORTED,
               "the auxiliary matrix has another type than D");
        demand(p.aux_ld >= (int64_t)f.m && p.aux_ld % 8 == 0, INVALID,
               "the auxiliary matrix has leading dimension %ld; wanted a multiple of 8, at least %zu",
               (long)p.aux_ld, f.m);
        demand(p.aux_stride % 8 == 0, INVALID,
               "the batch stride of the auxiliary matrix is not a multiple of 8");
    }
    if (f.needs_bias())
        demand(p.bias_type < 0 || p.bias_type == (int)out, UNSUPPORTED, "the bias has another type than D");
    return f;
}

void check_operands(const Matmul& f, const Algorithm& algorithm) {
    auto check = [&](const char* name, const void* p, uint32_t alignment, size_t bytes) {
        demand(p, INVALID, "%s is null", name);
        demand((uintptr_t)p % alignment == 0, INVALID,
               "%s is %p, not aligned to %u bytes as the preference promised", name, p, alignment);
        const std::string wrong = check_range(p, bytes, name);
        if (!wrong.empty())
            report(cudaErrorIllegalAddress,
                   "cublasLtMatmul: " + wrong);  // a fault, as it would be on a device
        demand(wrong.empty(), CUBLAS_STATUS_EXECUTION_FAILED, "%s", wrong.c_str());
    };
    auto bytes = [&](size_t batch_stride, size_t ld, size_t rows, size_t cols, cudaDataType_t type) {
        return ((size_t)(f.d.batch - 1) * batch_stride + (cols - 1) * ld + rows) * size_of(type);
    };
    auto check_matrix = [&](const char* name, const void* p, const Layout& l, uint32_t alignment) {
        check(name, p, alignment, bytes((size_t)l.stride, (size_t)l.ld, l.rows, l.cols, l.type));
    };
    check_matrix("A", f.A, f.a, algorithm.alignment[0]), check_matrix("B", f.B, f.b, algorithm.alignment[1]);
    if (f.beta != 0 || f.device_beta) check_matrix("C", f.C, f.c, algorithm.alignment[2]);
    check_matrix("D", f.D, f.d, algorithm.alignment[3]);
    demand(f.C != f.D || (f.c.ld == f.d.ld && f.c.stride == f.d.stride), INVALID,
           "C is D, with another layout");
    if (f.needs_aux())
        check("auxiliary matrix", f.p.aux, 16,
              bytes((size_t)f.p.aux_stride, (size_t)f.p.aux_ld, f.m, f.n, f.d.type));
    if (f.needs_bias())
        check("bias", f.p.bias, 16, bytes((size_t)f.p.bias_stride, 0, f.bias_count(), 1, f.d.type));
    for (const float* scalar : {f.device_alpha, f.device_beta})
        if (scalar) check("alpha or beta", scalar, 4, 4);
    demand(f.workspace_bytes >= algorithm.workspace, INVALID,
           "the algorithm needs a workspace of %zu bytes, given %zu", (size_t)algorithm.workspace,
           f.workspace_bytes);
    if (algorithm.workspace) check("workspace", f.workspace, 16, algorithm.workspace);
}

// Where a descriptor stores an attribute; null for an unknown attribute.
struct Field {
    void* p;
    size_t bytes;
    template <class T>
    Field(T& field) : p(&field), bytes(sizeof field) {}
    Field() : p(nullptr), bytes(0) {}
};
Field field(Product& p, cublasLtMatmulDescAttributes_t a) {
    switch (a) {
        case CUBLASLT_MATMUL_DESC_COMPUTE_TYPE:
            return p.compute;
        case CUBLASLT_MATMUL_DESC_SCALE_TYPE:
            return p.scale;
        case CUBLASLT_MATMUL_DESC_POINTER_MODE:
            return p.pointer_mode;
        case CUBLASLT_MATMUL_DESC_TRANSA:
            return p.trans_a;
        case CUBLASLT_MATMUL_DESC_TRANSB:
            return p.trans_b;
        case CUBLASLT_MATMUL_DESC_EPILOGUE:
            return p.epilogue;
        case CUBLASLT_MATMUL_DESC_BIAS_POINTER:
            return p.bias;
        case CUBLASLT_MATMUL_DESC_BIAS_BATCH_STRIDE:
            return p.bias_stride;
        case CUBLASLT_MATMUL_DESC_BIAS_DATA_TYPE:
            return p.bias_type;
        case CUBLASLT_MATMUL_DESC_EPILOGUE_AUX_POINTER:
            return p.aux;
        case CUBLASLT_MATMUL_DESC_EPILOGUE_AUX_LD:
            return p.aux_ld;
        case CUBLASLT_MATMUL_DESC_EPILOGUE_AUX_BATCH_STRIDE:
            return p.aux_stride;
        case CUBLASLT_MATMUL_DESC_EPILOGUE_AUX_DATA_TYPE:
            return p.aux_type;
        default:
            return {};
    }
}
Field field(Layout& l, cublasLtMatrixLayoutAttribute_t a) {
    switch (a) {
        case CUBLASLT_MATRIX_LAYOUT_TYPE:
            return l.type;
        case CUBLASLT_MATRIX_LAYOUT_ORDER:
            return l.order;
        case CUBLASLT_MATRIX_LAYOUT_ROWS:
            return l.rows;
        case CUBLASLT_MATRIX_LAYOUT_COLS:
            return l.cols;
        case CUBLASLT_MATRIX_LAYOUT_LD:
            return l.ld;
        case CUBLASLT_MATRIX_LAYOUT_BATCH_COUNT:
            return l.batch;
        case CUBLASLT_MATRIX_LAYOUT_STRIDED_BATCH_OFFSET:
            return l.stride;
        default:
            return {};
    }
}
Field field(Preference& p, cublasLtMatmulPreferenceAttributes_t a) {
    switch (a) {
        case CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES:
            return p.workspace;
        case CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES:
            return p.alignment[0];
        case CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_B_BYTES:
            return p.alignment[1];
        case CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_C_BYTES:
            return p.alignment[2];
        case CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES:
            return p.alignment[3];
        case CUBLASLT_MATMUL_PREF_SEARCH_MODE:
            return p.search_mode;
        case CUBLASLT_MATMUL_PREF_REDUCTION_SCHEME_MASK:
            return p.reduction_schemes;
        case CUBLASLT_MATMUL_PREF_IMPL_MASK:
            return p.implementations;
        case CUBLASLT_MATMUL_PREF_MAX_WAVES_COUNT:
            return p.most_waves;
        default:
            return {};
    }
}
cublasStatus_t copy_attribute(void* to, const void* from, size_t bytes, Field f) {
    return status_of([&] {
        demand(f.p, UNSUPPORTED, "the attribute");
        demand(to && from && bytes == f.bytes, INVALID, "the attribute has %zu bytes, given %zu", f.bytes,
               bytes);
        memcpy(to, from, bytes);
    });
}

template <class Handle, class Content>
cublasStatus_t create(Handle* handle, const Content& content) {
    static_assert(sizeof content <= sizeof **handle, "fits into the opaque descriptor");
    *handle = (Handle)calloc(1, sizeof **handle);
    if (!*handle) return CUBLAS_STATUS_ALLOC_FAILED;
    memcpy((void*)*handle, &content, sizeof content);
    return CUBLAS_STATUS_SUCCESS;
}
template <class Handle>
cublasStatus_t destroy(Handle handle) {
    free(handle);
    return CUBLAS_STATUS_SUCCESS;
}

}  // namespace
}  // namespace emu
using namespace emu;

extern "C" {

cublasStatus_t cublasLtCreate(cublasLtHandle_t* h) {
    return (*h = (cublasLtHandle_t)malloc(1)) ? CUBLAS_STATUS_SUCCESS : CUBLAS_STATUS_ALLOC_FAILED;
}
cublasStatus_t cublasLtDestroy(cublasLtHandle_t h) { return destroy(h); }
size_t cublasLtGetVersion() { return CUBLAS_VERSION; }

const char* cublasLtGetStatusName(cublasStatus_t s) {
    switch (s) {
#define NAME(status) \
    case status:     \
        return #status
        NAME(CUBLAS_STATUS_SUCCESS);
        NAME(CUBLAS_STATUS_ALLOC_FAILED);
        NAME(CUBLAS_STATUS_INVALID_VALUE);
        NAME(CUBLAS_STATUS_EXECUTION_FAILED);
        NAME(CUBLAS_STATUS_NOT_SUPPORTED);
#undef NAME
        default:
            return "unknown cuBLAS status";
    }
}
// The name of the status, followed by the reason of this thread's last refusal.
const char* cublasLtGetStatusString(cublasStatus_t s) {
    static thread_local std::string text;
    text = cublasLtGetStatusName(s);
    if (s != CUBLAS_STATUS_SUCCESS && !last_refusal.empty()) text += " (" + last_refusal + ")";
    return text.c_str();
}

// Functions that the three kinds of descriptor have in common
#define DESCRIPTOR(Name, Struct, Attributes)                                                       \
    cublasStatus_t Name##Destroy(Name##_t d) { return destroy(d); }                                \
    cublasStatus_t Name##SetAttribute(Name##_t d, Attributes a, const void* value, size_t bytes) { \
        const Field f = field(*(Struct*)d, a);                                                     \
        return copy_attribute(f.p, value, bytes, f);                                               \
    }                                                                                              \
    cublasStatus_t Name##GetAttribute(Name##_t d, Attributes a, void* value, size_t bytes,         \
                                      size_t* written) {                                           \
        const Field f = field(*(Struct*)d, a);                                                     \
        if (written) *written = f.bytes;                                                           \
        return copy_attribute(value, f.p, bytes, f);                                               \
    }
DESCRIPTOR(cublasLtMatmulDesc, Product, cublasLtMatmulDescAttributes_t)
DESCRIPTOR(cublasLtMatrixLayout, Layout, cublasLtMatrixLayoutAttribute_t)
DESCRIPTOR(cublasLtMatmulPreference, Preference, cublasLtMatmulPreferenceAttributes_t)
#undef DESCRIPTOR

cublasStatus_t cublasLtMatmulDescCreate(cublasLtMatmulDesc_t* desc, cublasComputeType_t compute,
                                        cudaDataType_t scale) {
    Product p = {};
    p.compute = compute, p.scale = scale, p.epilogue = CUBLASLT_EPILOGUE_DEFAULT,
    p.bias_type = p.aux_type = -1;
    return create(desc, p);
}
cublasStatus_t cublasLtMatrixLayoutCreate(cublasLtMatrixLayout_t* layout, cudaDataType type, uint64_t rows,
                                          uint64_t cols, int64_t ld) {
    return create(layout, Layout{type, CUBLASLT_ORDER_COL, 1, rows, cols, ld, 0});
}
cublasStatus_t cublasLtMatmulPreferenceCreate(cublasLtMatmulPreference_t* preference) {
    return create(preference,
                  Preference{0, {256, 256, 256, 256}, 0, CUBLASLT_REDUCTION_SCHEME_MASK, ~0ull, 0});
}

// Returns up to three algorithms, which differ in the workspace that they need. They rely on the alignment
// that the preference promises, up to 16 bytes.
cublasStatus_t cublasLtMatmulAlgoGetHeuristic(cublasLtHandle_t, cublasLtMatmulDesc_t desc,
                                              cublasLtMatrixLayout_t a, cublasLtMatrixLayout_t b,
                                              cublasLtMatrixLayout_t c, cublasLtMatrixLayout_t d,
                                              cublasLtMatmulPreference_t preference, int wanted,
                                              cublasLtMatmulHeuristicResult_t* results, int* found) {
    return status_of([&] {
        *found = 0;
        demand(wanted >= 1 && preference, INVALID, "no results wanted, or no preference");
        const Preference& p = *(Preference*)preference;
        product_of(desc, a, b, c, d);
        for (uint64_t workspace : {(uint64_t)0, (uint64_t)1 << 20, (uint64_t)4 << 20}) {
            if (*found == wanted || workspace > p.workspace) break;
            Algorithm algorithm = {ALGORITHM_ID, workspace, {}};
            for (int i = 0; i < 4; i++) algorithm.alignment[i] = std::min(p.alignment[i], 16u);
            cublasLtMatmulHeuristicResult_t& r = results[(*found)++];
            r = {};
            memcpy((void*)&r.algo, &algorithm, sizeof algorithm);
            r.workspaceSize = workspace, r.state = CUBLAS_STATUS_SUCCESS, r.wavesCount = 1;
        }
    });
}

static Algorithm algorithm_of(const cublasLtMatmulAlgo_t* algo) {
    Algorithm a = {ALGORITHM_ID, 0, {16, 16, 16, 16}};  // the default
    if (algo) memcpy(&a, algo, sizeof a);
    demand(a.id == ALGORITHM_ID, INVALID, "the algorithm is not one of the heuristic's");
    return a;
}
// Whether an algorithm, which may come from a file, can compute this product.
cublasStatus_t cublasLtMatmulAlgoCheck(cublasLtHandle_t, cublasLtMatmulDesc_t desc, cublasLtMatrixLayout_t a,
                                       cublasLtMatrixLayout_t b, cublasLtMatrixLayout_t c,
                                       cublasLtMatrixLayout_t d, const cublasLtMatmulAlgo_t* algo,
                                       cublasLtMatmulHeuristicResult_t* result) {
    return status_of([&] {
        product_of(desc, a, b, c, d);
        result->workspaceSize = algorithm_of(algo).workspace, result->state = CUBLAS_STATUS_SUCCESS,
        result->wavesCount = 1;
    });
}

cublasStatus_t cublasLtMatmul(cublasLtHandle_t handle, cublasLtMatmulDesc_t desc, const void* alpha,
                              const void* A, cublasLtMatrixLayout_t a, const void* B,
                              cublasLtMatrixLayout_t b, const void* beta, const void* C,
                              cublasLtMatrixLayout_t c, void* D, cublasLtMatrixLayout_t d,
                              const cublasLtMatmulAlgo_t* algo, void* workspace, size_t workspace_bytes,
                              cudaStream_t stream) {
    const cublasStatus_t status = status_of([&] {
        demand(fault_code() == cudaSuccess, CUBLAS_STATUS_EXECUTION_FAILED, "%s", last_report().c_str());
        demand(handle && alpha && beta, INVALID, "the handle, alpha or beta is null");
        Matmul f = product_of(desc, a, b, c, d);
        f.A = (const char*)A, f.B = (const char*)B, f.C = (const char*)C, f.D = (char*)D;
        f.workspace = workspace, f.workspace_bytes = workspace_bytes;
        if (f.p.pointer_mode == CUBLASLT_POINTER_MODE_HOST)
            f.alpha = *(const float*)alpha, f.beta = *(const float*)beta;
        else f.device_alpha = (const float*)alpha, f.device_beta = (const float*)beta;
        const Algorithm algorithm = algorithm_of(algo);
        demand(algorithm.workspace != options().failing_workspace, CUBLAS_STATUS_NOT_SUPPORTED,
               "options().failing_workspace is %zu", options().failing_workspace);
        check_operands(f, algorithm);
        const cudaError_t e = api([&] {
            submit(stream, [f, algorithm]() mutable {
                // Overwritten, so that a workspace that something else uses is noticed.
                if (algorithm.workspace) memset(f.workspace, 0xff, algorithm.workspace);
                if (f.device_alpha) f.alpha = *f.device_alpha;
                if (f.device_beta) f.beta = *f.device_beta;
                run(f);
                pass_time([&] {
                    return format("matmul epilogue %d workspace %zu", (int)f.p.epilogue,
                                  (size_t)algorithm.workspace);
                });
            });
        });
        demand(e == cudaSuccess, CUBLAS_STATUS_EXECUTION_FAILED, "%s", cudaGetErrorString(e));
    });
    if (status != CUBLAS_STATUS_SUCCESS && fault_code() == cudaSuccess)
        refuse(cudaErrorInvalidValue, "cublasLtMatmul: " + last_refusal);
    return status;
}

}  // extern "C"
