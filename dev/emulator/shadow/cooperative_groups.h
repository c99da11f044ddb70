// cooperative_groups.h - for emulated code, in place of CUDA's, which is empty without nvcc: the block, and
// tiles of a warp with sync, shuffles and reductions. Grid and cluster groups would need all blocks at once,
// and are not here.
#pragma once

namespace cooperative_groups {

struct thread_block {
    static unsigned size() { return blockDim.x * blockDim.y * blockDim.z; }
    static unsigned num_threads() { return size(); }
    static unsigned thread_rank() {
        return (threadIdx.z * blockDim.y + threadIdx.y) * blockDim.x + threadIdx.x;
    }
    static void sync(EMU_SITE_ARGS) { emu::block_barrier(emu::BARRIER_SYNC, false, EMU_SITE); }
};
inline thread_block this_thread_block() { return {}; }

template <unsigned N, class Parent = void>
struct thread_block_tile {
    static_assert(N > 0 && N <= 32 && (N & (N - 1)) == 0, "tiles of 1 to 32 threads");
    static unsigned mask() { return (unsigned)((1ull << N) - 1) << thread_block::thread_rank() % 32 / N * N; }
    static constexpr unsigned size() { return N; }
    static constexpr unsigned num_threads() { return N; }
    static unsigned thread_rank() { return thread_block::thread_rank() % N; }
    static unsigned meta_group_rank() { return thread_block::thread_rank() / N; }
    static unsigned meta_group_size() { return (thread_block::size() + N - 1) / N; }
    void sync(EMU_SITE_ARGS) const { __syncwarp(mask(), site_file, site_line); }
    template <class T>
    T shfl(T v, int source, EMU_SITE_ARGS) const {
        return __shfl_sync(mask(), v, source, N, site_file, site_line);
    }
    template <class T>
    T shfl_xor(T v, int bits, EMU_SITE_ARGS) const {
        return __shfl_xor_sync(mask(), v, bits, N, site_file, site_line);
    }
    template <class T>
    T shfl_down(T v, unsigned delta, EMU_SITE_ARGS) const {
        return __shfl_down_sync(mask(), v, delta, N, site_file, site_line);
    }
    template <class T>
    T shfl_up(T v, unsigned delta, EMU_SITE_ARGS) const {
        return __shfl_up_sync(mask(), v, delta, N, site_file, site_line);
    }
    int any(int p, EMU_SITE_ARGS) const { return __any_sync(mask(), p, site_file, site_line); }
    int all(int p, EMU_SITE_ARGS) const { return __all_sync(mask(), p, site_file, site_line); }
};
template <unsigned N, class Parent>
thread_block_tile<N, Parent> tiled_partition(const Parent&) {
    return {};
}

template <class T>
struct plus {
    T operator()(T a, T b) const { return a + b; }
};
template <class T>
struct less {
    T operator()(T a, T b) const { return b < a ? b : a; }
};
template <class T>
struct greater {
    T operator()(T a, T b) const { return a < b ? b : a; }
};
template <unsigned N, class Parent, class T, class Op>
T reduce(const thread_block_tile<N, Parent>& tile, T v, Op op, EMU_SITE_ARGS) {
    for (unsigned bits = N / 2; bits; bits /= 2) v = op(v, tile.shfl_xor(v, (int)bits, site_file, site_line));
    return v;
}
inline void sync(const thread_block&, EMU_SITE_ARGS) { thread_block::sync(site_file, site_line); }

}  // namespace cooperative_groups
