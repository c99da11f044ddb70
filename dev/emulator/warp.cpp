// warp.cpp - what the lanes of a warp do together: shuffles, reductions, ldmatrix, mma. Each is a function
// that the last lane to arrive runs for all lanes (warp_collective in threads.cpp).
#include "runtime.h"

namespace emu {

struct ShuffleLane {
    ShuffleKind kind;
    int argument, width;
    uint64_t sent, received;
};
static void shuffle_lanes(void* const* lanes, uint32_t mask, Site s) {
    for (int i = 0; i < 32; i++) {
        if (!(mask >> i & 1)) continue;
        ShuffleLane& me = *(ShuffleLane*)lanes[i];
        const int low = i & ~(me.width - 1), high = low + me.width;  // the lane's segment of `width` lanes
        int from = me.kind == SHUFFLE_INDEX  ? low + (me.argument & (me.width - 1))
                   : me.kind == SHUFFLE_XOR  ? i ^ me.argument
                   : me.kind == SHUFFLE_DOWN ? i + me.argument
                                             : i - me.argument;
        if (me.kind == SHUFFLE_UP ? from < low : from >= high) from = i;
        if (from < 0 || from > 31 || !(mask >> from & 1))
            fault(format("shuffle: lane %d reads lane %d, which has exited or is not in the mask", i, from),
                  s);
        me.received = ((ShuffleLane*)lanes[from])->sent;
    }
}
uint64_t shuffle(uint32_t mask, ShuffleKind kind, uint64_t bits, int argument, int width, Site s) {
    static const char* const names[] = {"__shfl_sync", "__shfl_xor_sync", "__shfl_down_sync",
                                        "__shfl_up_sync"};
    if (width < 1 || width > 32 || (width & (width - 1)))
        fault(format("%s: width %d", names[kind], width), s);
    ShuffleLane l = {kind, argument, width, bits, 0};
    warp_collective(mask, &l, shuffle_lanes, names[kind], s);
    return l.received;
}

struct ReduceLane {
    Reduction op;
    long long value;
};
static void reduce_lanes(void* const* lanes, uint32_t mask, Site) {
    const ReduceLane& first = *(ReduceLane*)lanes[__builtin_ctz(mask)];
    long long r = first.value;
    for (int i = 0; i < 32; i++) {
        if (!(mask >> i & 1) || lanes[i] == &first) continue;
        const long long v = ((ReduceLane*)lanes[i])->value;
        switch (first.op) {
            case REDUCE_ADD:
                r += v;
                break;
            case REDUCE_MIN:
                r = v < r ? v : r;
                break;
            case REDUCE_MAX:
                r = v > r ? v : r;
                break;
            case REDUCE_AND:
                r &= v;
                break;
            case REDUCE_OR:
                r |= v;
                break;
            case REDUCE_XOR:
                r ^= v;
                break;
        }
    }
    for (int i = 0; i < 32; i++)
        if (mask >> i & 1) ((ReduceLane*)lanes[i])->value = r;
}
long long reduce(uint32_t mask, Reduction op, long long value, const char* name, Site s) {
    ReduceLane l = {op, value};
    warp_collective(mask, &l, reduce_lanes, name, s);
    return l.value;
}

// ---------------------------------------------------------------------------------------------
// Tensor cores

struct MatrixLane {
    const uint32_t* row;
    uint32_t* r;
    int matrices;
    bool trans;
};
static void ldmatrix_lanes(void* const* lanes, uint32_t mask, Site s) {
    if (mask != 0xffffffffu) fault("ldmatrix needs all 32 lanes", s);
    for (int l = 0; l < 32; l++) {
        MatrixLane& me = *(MatrixLane*)lanes[l];
        for (int m = 0; m < me.matrices; m++) {
            uint16_t pair[2];
            for (int e = 0; e < 2; e++) {
                int row = l / 4, column = l % 4 * 2 + e;
                if (me.trans) std::swap(row, column);
                pair[e] = (uint16_t)(((MatrixLane*)lanes[8 * m + row])->row[column / 2] >> column % 2 * 16);
            }
            memcpy(&me.r[m], pair, 4);
        }
    }
}
void ldmatrix(uint32_t* r, const uint32_t* row, int matrices, bool trans, Site s) {
    MatrixLane l = {row, r, matrices, trans};
    warp_collective(0xffffffffu, &l, ldmatrix_lanes, "ldmatrix", s);
}

struct MmaLane {
    float* d;
    const uint32_t *a, *b;
    const float* c;
};
static float bf16_half(uint32_t pair, int high) {
    return bit_cast<float>(high ? pair & 0xffff0000u : pair << 16);
}

// With g = lane/4 and t = lane%4, element i of a lane's fragment is
//     A (16x16): row g + 8*(i/2%2), column 2t + i%2 + 8*(i/4)
//     B (16x8): row 2t + i%2 + 8*(i/2), column g
//     C, D (16x8): row g + 8*(i/2), column 2t + i%2
static void mma_lanes(void* const* lanes, uint32_t mask, Site s) {
    if (mask != 0xffffffffu) fault("mma needs all 32 lanes", s);
    typedef float Row __attribute__((vector_size(32)));
    float A[16][16], B[16][8], D[16][8];
    for (int l = 0; l < 32; l++) {
        const MmaLane& me = *(MmaLane*)lanes[l];
        const int g = l / 4, t = l % 4;
        for (int i = 0; i < 8; i++)
            A[g + i / 2 % 2 * 8][2 * t + i % 2 + i / 4 * 8] = bf16_half(me.a[i / 2], i % 2);
        for (int i = 0; i < 4; i++) B[2 * t + i % 2 + i / 2 * 8][g] = bf16_half(me.b[i / 2], i % 2);
        for (int i = 0; i < 4; i++) D[g + i / 2 * 8][2 * t + i % 2] = me.c[i];
    }
    for (int m = 0; m < 16; m++) {
        Row d, b;
        memcpy(&d, D[m], 32);
        for (int k = 0; k < 16; k++)
            memcpy(&b, B[k], 32), d += A[m][k] * b;  // exact products: that of two bf16 fits into fp32
        memcpy(D[m], &d, 32);
    }
    for (int l = 0; l < 32; l++)
        for (int i = 0; i < 4; i++) ((MmaLane*)lanes[l])->d[i] = D[l / 4 + i / 2 * 8][l % 4 * 2 + i % 2];
}
void mma_m16n8k16_bf16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], const float (&c)[4],
                       const char* file, int line) {
    MmaLane l = {d, a, b, c};
    warp_collective(0xffffffffu, &l, mma_lanes, "mma.m16n8k16", {file, line});
}

}  // namespace emu
