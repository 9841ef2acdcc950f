// Activations for decoding (see decode.cuh): where x lies in shared memory, and the warps that bring it there.
//
// A token's row is, in the order of the items, the runs that the CTA meets; from one row to the next it is an odd number of 16 bytes, so ldmatrix has
// no conflicts. Where the runs of each kind are neighbours in memory, bulk copies bring them, and CTAs of a cluster that read the same x fetch some
// tokens each for all of them; elsewhere threads bring 16 bytes a copy. In front of every three runs of an item of six are 64 bytes more: where x is
// in blocks of 32 precise and 96 quantized channels, a row is WHOLE, as it is in memory.
#pragma once
#include "products.cuh"

namespace rosaq {

struct DecodeShape {
    int tokens, row_warps, k_warps, splits;
    int sharing;                          // CTAs of the cluster that read the same x
    int chunks, way;                      // of a warp's stretch of x; how x is fetched: BY_THREADS, PACKED or WHOLE
    int pitch, x_bytes;                   // in shared memory: from one token to the next, and of all tokens
    uint32_t q_reciprocal, s_reciprocal;  // of runs per block, for `divide`
    uint16_t begin[200];                  // first item of every k_warp of every split, and the end
};
constexpr int BY_THREADS = 0, PACKED = 1, WHOLE = 2;
constexpr int FETCHERS = 4;  // warps of a CTA that bring x
constexpr int MOST_BARRIERS = 64;  // k_warps * chunks

// Where an item starts in a token's row, counted from item 0.
__device__ inline int place_of(const Weights& w, int item) { return min(item, w.q_items) * ITEM_BYTES + max(0, item - w.q_items) * 64; }

// Runs [first, first + count) of x, 16 bytes a copy, by all threads of the fetching warps; channels that do not exist read as zero. `to`: of item 0.
__device__ inline void fetch_runs(const Weights& w, const DecodeShape& shape, const uint16_t* x, int64_t x_stride, int first, int count, uint32_t to,
                                  int part) {
    const int q_runs = w.q_items * RUNS;
    for (int i = 32 * part + (threadIdx.x & 31); i < 4 * count; i += 32 * FETCHERS) {
        const int piece = i & 3, run = first + (i >> 2);
        const bool salient = run >= q_runs;
        const int r = salient ? run - q_runs : run, per_block = salient ? w.s_runs_per_block : w.q_runs_per_block;
        const int block = divide(r, salient ? shape.s_reciprocal : shape.q_reciprocal), within = 32 * (r - block * per_block) + 8 * piece;
        const bool there = block < w.blocks && within < (salient ? w.s_valid : w.q_valid);
        const uint16_t* from = there ? x + int64_t(block) * w.block_size + (salient ? w.s_offset : w.q_offset) + within : x;
        const uint32_t run_to = to + 16 * piece + (salient ? place_of(w, w.q_items + r) : place_of(w, r / RUNS) + place_in_item(r % RUNS));
        for (int m = 0; m < shape.tokens; ++m) {
            asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(run_to + m * shape.pitch), "l"(from + (there ? m * x_stride : 0)),
                         "r"(there ? 16 : 0)
                         : "memory");
        }
    }
}
// Arrives when this thread's copies so far are done.
__device__ inline void copy_arrive(uint32_t bar) { asm volatile("cp.async.mbarrier.arrive.noinc.shared::cta.b64 [%0];" ::"r"(bar) : "memory"); }

__device__ inline void copy_bulk(uint32_t to, const void* from, uint32_t bytes, uint32_t bar, int sharing, uint32_t cluster_ranks) {
    if (sharing == 1)
        asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(to), "l"(from), "r"(bytes), "r"(bar)
                     : "memory");
    else
        asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster [%0], [%1], %2, [%3], %4;" ::"r"(to), "l"(from),
                     "r"(bytes), "r"(bar), "h"(uint16_t(cluster_ranks))
                     : "memory");
}
// Items [begin, end) of x by bulk copies of one thread of each fetching warp: some of the tokens, into the shared memory of all CTAs that share x.
__device__ inline void fetch_items(const Weights& w, const DecodeShape& shape, const uint16_t* x, int64_t x_stride, int begin, int end, uint32_t to,
                                   uint32_t bar, int part) {
    const int sharing = shape.sharing, rank = sharing == 1 ? 0 : blockIdx.x % sharing, s_begin = max(begin, w.q_items);
    const bool whole = shape.way == WHOLE;
    const uint32_t q_bytes = max(0, min(end, w.q_items) - begin) * ITEM_BYTES, s_bytes = whole ? 0 : max(0, end - s_begin) * 64;
    if (part == 0) barrier_expect(bar, shape.tokens * (q_bytes + s_bytes));
    const uint32_t ranks = ((1u << sharing) - 1) << (blockIdx.y * sharing);
    for (int m = rank + sharing * part; m < shape.tokens; m += sharing * FETCHERS) {
        const uint16_t* from = x + m * x_stride;
        const uint32_t row = to + m * shape.pitch;
        if (q_bytes) copy_bulk(row + begin * ITEM_BYTES, from + (whole ? 0 : w.q_offset) + begin * (ITEM_BYTES / 2), q_bytes, bar, sharing, ranks);
        if (s_bytes) copy_bulk(row + place_of(w, s_begin), from + w.s_offset + (s_begin - w.q_items) * 32, s_bytes, bar, sharing, ranks);
    }
}
// What a fetching warp does: all pieces of x in the order in which they are needed, a barrier for each.
__device__ inline void fetch_x(const Weights& w, const DecodeShape& shape, const uint16_t* x, int64_t x_stride, const uint16_t* share, uint32_t to,
                               uint32_t bars, int warp) {
    for (int c = 0; c < shape.chunks; ++c) {
        for (int k = 0; k < shape.k_warps; ++k) {
            const int begin = share[k], end = share[k + 1], chunk = (end - begin + shape.chunks - 1) / shape.chunks, part = (warp + k) % FETCHERS;
            const int first = min(begin + c * chunk, end), last = min(first + chunk, end);
            const uint32_t bar = bars + 8 * (k * shape.chunks + c);
            if (shape.way == BY_THREADS) {
                fetch_runs(w, shape, x, x_stride, item_run(w, first), item_run(w, last) - item_run(w, first), to, part);
                copy_arrive(bar);
            } else if ((threadIdx.x & 31) == 0) {
                fetch_items(w, shape, x, x_stride, first, last, to, bar, part);
            }
        }
    }
    __syncwarp();
}

}  // namespace rosaq
