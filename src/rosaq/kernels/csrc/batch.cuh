// Batches (M 17 and more): wgmma with the dequantized weight as the A operand in registers and a tile of x in shared memory.
//
// A CTA owns R = 4 * warp_groups * TILES row tiles, TOKENS tokens and, in a cluster of `splits` CTAs, one stretch of the items. One thread of the last
// warp group, which leaves its registers to the others, fetches with the tensor copy engine, three copies a stage (a copy costs its issuing
// thread a hundred cycles and more, whatever its size): codes of all tiles, scales of all tiles, all runs of x; what does not exist reads as zero.
// The other groups, with 64 rows each (TILES times), dequantize the next part while the tensor cores multiply the last one. More rows per CTA mean
// less of x through L2. The weight's copies start before the previous kernel of the stream has finished.
#pragma once
#include "format.cuh"
#include "wgmma.cuh"

namespace rosaq {

struct BatchShape {
    int tokens, warp_groups;
    int splits, slots, slot_bytes, row_tiles;  // row_tiles: per CTA
    int wide;            // x comes in boxes of 64 channels instead of 32
    uint16_t begin[10];  // first item of every split, and the end; salient items in pairs
};

// Tensors that the copy engine reads; made on the host for each launch. Weights in units of 8 bytes, x in channels.
struct BatchMaps {
    CUtensorMap codes, scales, salient;  // (bytes of an item / 8 / parts, parts, tiles, items)
    CUtensorMap q_x, s_x;                // (32 or 64 channels, tokens, runs of a block, blocks)
};
constexpr int CODE_PARTS = CODE_BYTES > 2048 ? 2 : 1;  // a box is at most 256 units wide
constexpr int SALIENT_RUNS = 2;                        // per stage
constexpr int AHEAD = 2;  // stages whose weights are fetched before x may be read: of more, the first x would wait behind the last weights

__device__ inline void copy_weights(uint32_t to, const CUtensorMap* map, int item, int tile, uint32_t bar) {
    asm volatile("cp.async.bulk.tensor.4d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%2, %2, %3, %4}], [%5];" ::"r"(to),
                 "l"(map), "r"(0), "r"(tile), "r"(item), "r"(bar)
                 : "memory");
}
__device__ inline void copy_x(uint32_t to, const CUtensorMap* map, int token, int run, int block, uint32_t bar) {
    asm volatile("cp.async.bulk.tensor.4d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3, %4, %5}], [%6];" ::"r"(to),
                 "l"(map), "r"(0), "r"(token), "r"(run), "r"(block), "r"(bar)
                 : "memory");
}
__device__ inline void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ inline void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int PENDING>
__device__ inline void wgmma_wait() {
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(PENDING) : "memory");
}
// B operand: TOKENS rows of 64 (128) bytes, swizzled over as many, groups of 8 rows 512 (1024) bytes apart.
__device__ inline uint64_t x_descriptor(uint32_t address, bool wide) {
    return uint64_t((address & 0x3ffff) >> 4) | (uint64_t(1) << 16) | (uint64_t(wide ? 64 : 32) << 32) | (uint64_t(wide ? 1 : 2) << 62);
}

// Where a stage's runs of x start; moves on without divisions.
struct Place {
    int per_block, step_blocks, step, block, within;
    __device__ Place(int per_block, int runs, int stage) : per_block(per_block), step_blocks(runs / per_block), step(runs % per_block) {
        block = stage * runs / per_block, within = stage * runs % per_block;
    }
    __device__ void advance() {
        block += step_blocks, within += step;
        if (within >= per_block) within -= per_block, ++block;
    }
};

// What the fetching thread does. In shared memory a stage is x, then the codes of every tile, then the scales; or x, then salient runs.
template <int TOKENS>
__device__ inline void fetch_stages(const Weights& w, const BatchMaps& maps, const BatchShape& shape, uint32_t slots, uint32_t bars, int begin, int end,
                                    int first_tile, int token) {
    const int R = shape.row_tiles;
    const uint32_t q_bytes = RUNS * TOKENS * 64 + R * (CODE_BYTES + SCALE_BYTES), s_bytes = SALIENT_RUNS * (TOKENS * 64 + R * w.s_item_bytes);
    auto weights = [&](int item, int slot) {
        const uint32_t bar = bars + slot * 16, to = slots + slot * shape.slot_bytes;
        if (item < w.q_items) {
            barrier_expect(bar, q_bytes);
            copy_weights(to + RUNS * TOKENS * 64, &maps.codes, item, first_tile, bar);
            copy_weights(to + RUNS * TOKENS * 64 + R * CODE_BYTES, &maps.scales, item, first_tile, bar);
        } else {
            barrier_expect(bar, s_bytes);
            copy_weights(to + SALIENT_RUNS * TOKENS * 64, &maps.salient, item - w.q_items, first_tile, bar);
        }
    };
    auto next = [&](int item) { return item < w.q_items ? item + 1 : item + SALIENT_RUNS; };
    int item = begin;
    for (int s = 0; s < AHEAD && item < end; ++s, item = next(item)) weights(item, s);
    wait_for_previous();
    Place q(w.q_runs_per_block, RUNS, begin), s(w.s_runs_per_block, SALIENT_RUNS, max(0, begin - w.q_items) / SALIENT_RUNS);
    item = begin;
    for (int i = 0, slot = 0, parity = 1; item < end; ++i) {
        if (i >= shape.slots) barrier_wait(bars + slot * 16 + 8, parity);
        if (i >= AHEAD) weights(item, slot);
        const uint32_t bar = bars + slot * 16, to = slots + slot * shape.slot_bytes;
        if (item < w.q_items) {
            copy_x(to, &maps.q_x, token, q.within >> shape.wide, q.block, bar);
            q.advance();
        } else {
            copy_x(to, &maps.s_x, token, s.within >> shape.wide, s.block, bar);
            s.advance();
        }
        item = next(item);
        if (++slot == shape.slots) slot = 0, parity ^= 1;
    }
}

// Steps `from` to `from` + STEPS of unit u of a block, dequantized, as A operands: in the type of x, scales included.
template <int STEPS>
__device__ inline void weights_of(const uint32_t* words, const uint8_t* scales, int u, int from, int lane, uint32_t (&a)[STEPS][4]) {
    auto group = [&](int run) { return make_group(*reinterpret_cast<const uint2*>(scales + run / GROUP_RUNS * GROUP_BYTES + 8 * (lane >> 2))); };
    const Group first = group(2 * u), second = (2 * u + 1) % GROUP_RUNS ? first : group(2 * u + 1);
    uint32_t unit[4][4];  // what is not used of it is not made either
    expand(words, first, second, unit);
    const uint32_t s[2][2] = {{twice(first.scale(0)), twice(first.scale(1))}, {twice(second.scale(0)), twice(second.scale(1))}};
#pragma unroll
    for (int j = 0; j < STEPS; ++j)
#pragma unroll
        for (int p = 0; p < 4; ++p) a[j][p] = mul2(unit[from + j][p], s[(from + j) >> 1][p & 1]);
}

// The warp group that fetches leaves registers to the others: 24 and 112 a thread, 96 at the start (five groups have 65536 together).
__device__ inline void give_registers() { asm volatile("setmaxnreg.dec.sync.aligned.u32 24;"); }
__device__ inline void take_registers() { asm volatile("setmaxnreg.inc.sync.aligned.u32 112;"); }
__device__ inline void sync_warps(int warps) { asm volatile("barrier.sync 1, %0;" ::"r"(32 * warps) : "memory"); }

template <int TOKENS, int TILES>
__global__ void __launch_bounds__(640, 1) batch(const __grid_constant__ Weights w, const __grid_constant__ BatchMaps maps,
                                               uint16_t* __restrict__ y, int64_t y_stride, const __grid_constant__ BatchShape shape) {
    extern __shared__ __align__(1024) uint8_t shared[];
    const int warp = __shfl_sync(~0u, threadIdx.x >> 5, 0);  // the compiler sees that it is one value per warp
    const int lane = threadIdx.x & 31, row_warps = 4 * shape.warp_groups, R = row_warps * TILES;
    const int split = shape.splits == 1 ? 0 : blockIdx.y, first_tile = blockIdx.x * R, token = blockIdx.z * TOKENS;
    const uint32_t slots = shared_address(shared), bars = slots + shape.slots * shape.slot_bytes;  // per slot: full, empty
    const int begin = shape.begin[split], end = shape.begin[split + 1];
    if (threadIdx.x == 0) {
        for (int s = 0; s < shape.slots; ++s) barrier_init(bars + s * 16, 1), barrier_init(bars + s * 16 + 8, row_warps);
        barrier_init_fence();
    }
    __syncthreads();
    let_next_start();

    if (warp >= row_warps) {
        give_registers();
        if (warp == row_warps && lane == 0) fetch_stages<TOKENS>(w, maps, shape, slots, bars, begin, end, first_tile, token);
        return;
    }
    take_registers();
    const uint64_t half = (shape.wide ? 64 : TOKENS * 64) / 16;  // from the first 32 channels of 64 to the others
    float acc[TILES][TOKENS / 2];
#pragma unroll
    for (int t = 0; t < TILES; ++t)
#pragma unroll
        for (int i = 0; i < TOKENS / 2; ++i) acc[t][i] = 0.f;

    const bool bytes = w.salient_scales != nullptr;
    const uint32_t codes_at = RUNS * TOKENS * 64 + warp * CODE_BYTES;
    const uint32_t scales_at = RUNS * TOKENS * 64 + R * CODE_BYTES + warp * SCALE_BYTES;
    const uint32_t salient_at = SALIENT_RUNS * TOKENS * 64;
    constexpr int STEPS = TOKENS * TILES == 128 ? 2 : 4, PARTS = UNITS * 4 / STEPS;  // of a unit multiplied together; where registers are short, two
    uint32_t a[2][STEPS][4];
    int slot = 0, previous = -1;
    uint32_t parity = 0;
    auto next_slot = [&]() {
        if (++slot == shape.slots) slot = 0, parity ^= 1;
    };
    const int q_end = min(end, w.q_items);
    for (int item = begin; item < q_end; ++item) {
        barrier_wait(bars + slot * 16, parity);
        const uint8_t* stage = shared + slot * shape.slot_bytes;
        const uint64_t x = x_descriptor(slots + slot * shape.slot_bytes, shape.wide);
        uint32_t words[TILES][WORDS];
#pragma unroll
        for (int t = 0; t < TILES; ++t) load_words<WORDS>(stage + codes_at + t * row_warps * CODE_BYTES, lane, words[t], FromShared{});
#pragma unroll
        for (int part = 0; part < PARTS * TILES; ++part) {
            const int t = part % TILES, step = part / TILES * STEPS, u = step / 4;
            weights_of<STEPS>(words[t] + u * RAW, stage + scales_at + t * row_warps * SCALE_BYTES, u, step % 4, lane, a[part & 1]);
            wgmma_fence();
#pragma unroll
            for (int j = 0; j < STEPS; ++j)
                Wgmma<TOKENS>::run(acc[t], a[part & 1][j], x + ((step + j) / 4 * TOKENS * 128 + (j & 1) * 32) / 16 + ((step + j) & 2 ? half : 0));
            wgmma_commit();
            if (PARTS * TILES % 2 && part == PARTS * TILES - 1) wgmma_wait<0>();
            else wgmma_wait<1>();  // the part before is done: its registers, and after the first part the slot before, are free
            if (part == 0 && previous >= 0 && lane == 0) barrier_arrive(bars + previous * 16 + 8);
        }
        previous = slot;
        next_slot();
    }
    wgmma_wait<0>();
    if (previous >= 0 && lane == 0) barrier_arrive(bars + previous * 16 + 8);
    for (int item = max(begin, w.q_items); item < end; item += SALIENT_RUNS) {
        barrier_wait(bars + slot * 16, parity);
        const uint8_t* stage = shared + slot * shape.slot_bytes;
        const uint64_t x = x_descriptor(slots + slot * shape.slot_bytes, shape.wide);
#pragma unroll
        for (int t = 0; t < TILES; ++t) {
            const int row = min(first_tile + warp + t * row_warps, w.tiles - 1) * 16 + (lane >> 2);
            const uint32_t scale[2] = {bytes ? twice(__half2float(w.salient_scales[row])) : ONES, bytes ? twice(__half2float(w.salient_scales[row + 8])) : ONES};
#pragma unroll
            for (int h = 0; h < SALIENT_RUNS; ++h) {
                const uint8_t* from = stage + salient_at + (h * R + t * row_warps + warp) * w.s_item_bytes;
                uint32_t words[8], s[2][4];
                if (bytes) load_words<4>(from, lane, words, FromShared{});
                else load_words<8>(from, lane, words, FromShared{});
                expand_salient(words, bytes, s);
#pragma unroll
                for (int j = 0; j < 2; ++j)
#pragma unroll
                    for (int p = 0; p < 4; ++p) a[h][j][p] = bytes ? mul2(s[j][p], scale[p & 1]) : s[j][p];
                wgmma_fence();
#pragma unroll
                for (int j = 0; j < 2; ++j) Wgmma<TOKENS>::run(acc[t], a[h][j], x + j * 32 / 16 + (h ? half : 0));
                wgmma_commit();
            }
            wgmma_wait<0>();
        }
        if (lane == 0) barrier_arrive(bars + slot * 16 + 8);
        next_slot();
    }

    // Sums to shared memory, [token][rows], where the stages were; then over the CTAs of the cluster, a share of the tokens each.
    sync_warps(row_warps);
    const int rows = R * 16, pitch = rows + 4, here = min(TOKENS, shape.tokens - token), threads = 32 * row_warps;
    float* sums = reinterpret_cast<float*>(shared);
#pragma unroll
    for (int t = 0; t < TILES; ++t)
#pragma unroll
        for (int i = 0; i < TOKENS / 2; ++i)
            sums[(8 * (i >> 2) + 2 * (lane & 3) + (i & 1)) * pitch + (warp + t * row_warps) * 16 + (lane >> 2) + 8 * ((i >> 1) & 1)] = acc[t][i];
    sync_warps(row_warps);
    if (shape.splits == 1) {
        for (int o = threadIdx.x; o < here * rows / 4; o += threads) {
            const int m = o / (rows / 4), row = 4 * (o % (rows / 4));
            const float4 v = *reinterpret_cast<const float4*>(sums + m * pitch + row);
            const float total[4] = {v.x, v.y, v.z, v.w};
            store_four(w, y, y_stride, token + m, first_tile * 16 + row, total);
        }
        return;
    }
    cluster_sync();
    for (int o = threadIdx.x + threads * split; o < here * rows / 4; o += threads * shape.splits) {
        const int m = o / (rows / 4), row = 4 * (o % (rows / 4));
        float total[4] = {};
        for (int s = 0; s < shape.splits; ++s) add_remote(total, slots + (m * pitch + row) * 4, s);
        store_four(w, y, y_stride, token + m, first_tile * 16 + row, total);
    }
    cluster_sync();  // nobody leaves while its sums are being read
}

}  // namespace rosaq
