// Few tokens (M <= 16): every warp streams its own row tiles.
//
// A CTA owns R = `row_warps` * TILES row tiles and, in a cluster of `splits` CTAs, one stretch of their items; its warps are
// row_warps x k_warps, each with TILES tiles and a stretch of the CTA's items. A warp copies DEPTH items per tile ahead (cp.async) into its own
// ring in shared memory and needs no other warp until the sums are added up, but for x: the row_warps warps that meet the same channels bring
// them together, in one or two chunks, and wait for each chunk only when they get there. Weights are fetched before the previous kernel of the
// stream has finished; x, which that kernel may be writing, is read after.
//
// x lies in shared memory as [run][token][64 bytes], its 16-byte pieces exchanged as in the 64-byte swizzle, so ldmatrix has no conflicts.
// The sums are added in a fixed order: results do not change from run to run.
#pragma once
#include "products.cuh"

namespace rosaq {

__device__ inline void copy_16(uint32_t to, const void* from) {
    asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16;" ::"r"(to), "l"(from) : "memory");
}
__device__ inline void copy_16_if(bool wanted, uint32_t to, const void* from) {  // a branch would cost more
    asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %2, 0;\n@p cp.async.cg.shared.global.L2::128B [%0], [%1], 16;\n}" ::"r"(to), "l"(from), "r"(int(wanted))
                 : "memory");
}
__device__ inline void copy_8(uint32_t to, const void* from) {
    asm volatile("cp.async.ca.shared.global [%0], [%1], 8;" ::"r"(to), "l"(from) : "memory");
}
__device__ inline void copy_4(uint32_t to, const void* from) {
    asm volatile("cp.async.ca.shared.global [%0], [%1], 4;" ::"r"(to), "l"(from) : "memory");
}
__device__ inline void copy_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int PENDING>
__device__ inline void copy_wait() {  // until at most PENDING of this thread's groups are under way
    asm volatile("cp.async.wait_group %0;" ::"n"(PENDING) : "memory");
}

struct DecodeShape {
    int tokens, row_warps, k_warps, splits, x_bytes;
    uint32_t q_reciprocal, s_reciprocal;  // of runs per block, for `divide`
    uint16_t begin[200];                  // first item of every k_warp of every split, and the end
};
__host__ __device__ constexpr int depth_of(int tiles) { return tiles == 1 ? 4 : 2; }

// Chunks of a warp's stretch of x, for which it waits one after the other: below 9 tokens x is soon there.
__host__ __device__ constexpr int chunks_of(int token_tiles) { return token_tiles == 1 ? 1 : 2; }
constexpr int MOST_WARPS = 24;  // of a CTA
// Bytes of a run of x in shared memory: above 8 tokens always those of 16, a constant.
template <int TOKEN_TILES>
__device__ inline int run_bytes_of(int tokens) { return TOKEN_TILES == 2 ? 1024 : tokens * 64; }

// Runs [first, first + count) of x, all tokens, to shared memory, by the warps that read them; channels that do not exist read as zero.
__device__ inline void stage_x(const Weights& w, const DecodeShape& shape, const uint16_t* x, int64_t x_stride, int first, int count, uint32_t to, int run_bytes,
                               int row_warp) {
    const int q_runs = w.q_items * RUNS, tokens = shape.tokens, lane = threadIdx.x & 31;
    const int over_tokens = min(tokens, shape.row_warps), over_pieces = shape.row_warps / over_tokens;  // how the warps share the work
    const int token = row_warp % over_tokens, part = row_warp / over_tokens;
    if (part >= over_pieces) return;
    for (int i = 32 * part + lane; i < 4 * count; i += 32 * over_pieces) {
        const int piece = i & 3, run = first + (i >> 2);
        const bool salient = run >= q_runs;
        const int r = salient ? run - q_runs : run, per_block = salient ? w.s_runs_per_block : w.q_runs_per_block;
        const int block = divide(r, salient ? shape.s_reciprocal : shape.q_reciprocal), within = 32 * (r - block * per_block) + 8 * piece;
        const bool there = block < w.blocks && within < (salient ? w.s_valid : w.q_valid);
        const uint16_t* from = there ? x + int64_t(block) * w.block_size + (salient ? w.s_offset : w.q_offset) + within : x;
        const uint32_t run_to = to + (i >> 2) * run_bytes;
        for (int m = token; m < tokens; m += over_tokens) {
            asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(run_to + m * 64 + ((piece ^ ((m >> 1) & 3)) << 4)),
                         "l"(from + (there ? m * x_stride : 0)), "r"(there ? 16 : 0)
                         : "memory");
        }
    }
}
// Arrives when this thread's copies so far are done.
__device__ inline void copy_arrive(uint32_t bar) { asm volatile("cp.async.mbarrier.arrive.noinc.shared::cta.b64 [%0];" ::"r"(bar) : "memory"); }

template <int TOKEN_TILES, int TILES>
__global__ void __launch_bounds__(TOKEN_TILES == 1 ? 32 * MOST_WARPS : TILES == 1 ? 384 : 512, TOKEN_TILES == 2 && TILES == 1 ? 2 : 1)
    decode(const __grid_constant__ Weights w, const uint16_t* __restrict__ x, int64_t x_stride, uint16_t* __restrict__ y, int64_t y_stride,
           const __grid_constant__ DecodeShape shape) {
    constexpr int CHUNKS = chunks_of(TOKEN_TILES), DEPTH = depth_of(TILES), STAGE_BYTES = TILES * SLOT_BYTES, RING_BYTES = DEPTH * STAGE_BYTES;
    extern __shared__ __align__(1024) uint8_t shared[];
    const int lane = threadIdx.x & 31, warp = __shfl_sync(~0u, threadIdx.x >> 5, 0);  // the compiler sees that it is one value per warp
    const int row_warp = warp % shape.row_warps, k_warp = warp / shape.row_warps;
    const int split = blockIdx.y, R = shape.row_warps * TILES;
    const int first_tile = blockIdx.x * R, my_tile = first_tile + row_warp * TILES;
    const uint32_t x_shared = shared_address(shared);
    uint8_t* ring = shared + shape.x_bytes + warp * RING_BYTES;
    const uint16_t* share = shape.begin + split * shape.k_warps;
    const int cta_begin = share[0], begin = share[k_warp], share_end = share[k_warp + 1], end = my_tile < w.tiles ? share_end : begin;
    const int q_end = min(end, w.q_items);
    const bool bytes = w.salient_scales != nullptr;
    __shared__ uint64_t x_ready[MOST_WARPS * CHUNKS];  // per part of the CTA's items and chunk of x
    if (threadIdx.x < shape.k_warps * CHUNKS) barrier_init(shared_address(x_ready + threadIdx.x), shape.row_warps * 32);
    __syncthreads();

    // Where the next items to fetch lie. A warp's second tile may not exist: what is read in its place is never stored.
    const uint8_t* codes = codes_of(w, begin, my_tile) + 16 * lane;
    const uint8_t* scales = scales_of(w, begin, my_tile) + 16 * lane;
    const uint8_t* salient = salient_of(w, max(0, begin - w.q_items), my_tile) + 16 * lane;
    const int64_t next_codes = int64_t(w.tiles) * CODE_BYTES, next_scales = int64_t(w.tiles) * SCALE_BYTES, next_salient = int64_t(w.tiles) * w.s_item_bytes;
    constexpr int LANES = SCALE_BYTES / 16;  // that fetch a tile's scales
    const uint32_t ring_at = shared_address(ring), codes_to = ring_at + 16 * lane;
    const uint32_t scales_to = ring_at + lane / LANES * SLOT_BYTES + CODE_BYTES + 16 * (lane % LANES);
    auto fetch = [&](int slot, int item) {  // one group per call, also past the end, so that groups count items
        if (item < q_end) {
#pragma unroll
            for (int i = 0; i < TILES; ++i) {
                const uint32_t to = codes_to + slot * STAGE_BYTES + i * SLOT_BYTES;
                const uint8_t* from = codes + i * CODE_BYTES;
#pragma unroll
                for (int k = 0; k < WORDS / 4; ++k) copy_16(to + 512 * k, from + 512 * k);
                if (WORDS % 4 == 2) copy_8(to + 512 * (WORDS / 4) - 8 * lane, from + 512 * (WORDS / 4) - 8 * lane);
                if (WORDS % 4 == 1) copy_4(to + 512 * (WORDS / 4) - 12 * lane, from + 512 * (WORDS / 4) - 12 * lane);
            }
            copy_16_if(lane < TILES * LANES, scales_to + slot * STAGE_BYTES, scales);
            codes += next_codes, scales += next_scales;
        } else if (item < end) {
#pragma unroll
            for (int i = 0; i < TILES; ++i) {
                const uint32_t to = codes_to + slot * STAGE_BYTES + i * SLOT_BYTES;
                const uint8_t* from = salient + i * w.s_item_bytes;
                copy_16(to, from);
                copy_16_if(!bytes, to + 512, from + 512);
            }
            salient += next_salient;
        }
        copy_commit();
    };
#pragma unroll
    for (int d = 0; d < DEPTH; ++d) fetch(d, begin + d);
    let_next_start();
    wait_for_previous();
    const int run_bytes = run_bytes_of<TOKEN_TILES>(shape.tokens), first_run = item_run(w, cta_begin);
    const int chunk = (share_end - begin + CHUNKS - 1) / CHUNKS;  // items per chunk
    uint32_t ready = shared_address(x_ready + k_warp * CHUNKS);
    for (int c = 0, run = item_run(w, begin); c < CHUNKS; ++c) {
        const int run_end = item_run(w, min(begin + (c + 1) * chunk, share_end));
        stage_x(w, shape, x, x_stride, run, run_end - run, x_shared + (run - first_run) * run_bytes, run_bytes, row_warp);
        copy_arrive(ready + 8 * c);
        run = run_end;
    }

    // Addresses that this lane gives ldmatrix: of 8 tokens, piece lane / 8 of token lane % 8; of 16, the pieces of a step for tokens lane % 8, then for
    // tokens 8 + lane % 8 (the last token again where there are fewer).
    const int token = min((lane & 7) + (TOKEN_TILES == 2 ? lane >> 4 << 3 : 0), shape.tokens - 1);
    uint32_t x_at[TOKEN_TILES];
#pragma unroll
    for (int i = 0; i < TOKEN_TILES; ++i) {
        const int piece = TOKEN_TILES == 2 ? 2 * i + (lane >> 3 & 1) : lane >> 3;
        x_at[i] = x_shared + token * 64 + ((piece ^ ((token >> 1) & 3)) << 4) + (item_run(w, begin) - first_run) * run_bytes;
    }
    float acc[TILES][TOKEN_TILES][4] = {};
    int item = begin, next_chunk = begin, slot = 0;
    auto wait = [&]() {
        if (CHUNKS > 1 && item == next_chunk) {
            barrier_wait(ready, 0);
            ready += 8, next_chunk += chunk;
        }
        copy_wait<DEPTH - 1>();
        __syncwarp();
    };
    if (CHUNKS == 1) barrier_wait(ready, 0);
    while (item < q_end) {
#pragma unroll
        for (slot = 0; slot < DEPTH; ++slot) {
            if (item >= q_end) break;
            wait();
            multiply_block<TOKEN_TILES, TILES>(ring + slot * STAGE_BYTES, lane, x_at, run_bytes, acc);
#pragma unroll
            for (int i = 0; i < TOKEN_TILES; ++i) x_at[i] += RUNS * run_bytes;
            __syncwarp();
            fetch(slot, item + DEPTH);
            ++item;
        }
    }
    float sum[TILES][TOKEN_TILES][4] = {};
    for (slot %= DEPTH; item < end; ++item) {
        wait();
        uint32_t b[TOKEN_TILES][4];
        load_x<TOKEN_TILES>(b, x_at, 0, run_bytes);
#pragma unroll
        for (int i = 0; i < TOKEN_TILES; ++i) x_at[i] += run_bytes;
#pragma unroll
        for (int i = 0; i < TILES; ++i) {
            const uint8_t* data = ring + slot * STAGE_BYTES + i * SLOT_BYTES;
            uint32_t words[8], a[2][4];
            if (bytes) load_words<4>(data, lane, words, FromShared{});
            else load_words<8>(data, lane, words, FromShared{});
            expand_salient(words, bytes, a);
#pragma unroll
            for (int j = 0; j < 2; ++j)
#pragma unroll
                for (int n = 0; n < TOKEN_TILES; ++n) mma(sum[i][n], a[j], x_pair<TOKEN_TILES>(b, n, j)[0], x_pair<TOKEN_TILES>(b, n, j)[1]);
        }
        __syncwarp();
        fetch(slot, item + DEPTH);
        slot = slot == DEPTH - 1 ? 0 : slot + 1;
    }
#pragma unroll
    for (int i = 0; i < TILES; ++i) {
        float scale[2] = {1.f, 1.f};
        if (bytes) {
            const int row = min(my_tile + i, w.tiles - 1) * 16 + (lane >> 2);
            scale[0] = __half2float(w.salient_scales[row]), scale[1] = __half2float(w.salient_scales[row + 8]);
        }
#pragma unroll
        for (int n = 0; n < TOKEN_TILES; ++n)
#pragma unroll
            for (int e = 0; e < 4; ++e) acc[i][n][e] = acc[i][n][e] * (1.f / unit_of(e >> 1)) + scale[e >> 1] * sum[i][n][e];
    }

    // Sums of all warps to shared memory, [tile][token][16 rows] in each warp's own ring; added over the warps, then over the CTAs of the cluster.
    copy_wait<0>();
    constexpr int TILE_FLOATS = 16 * 8 * TOKEN_TILES;
    float* sums = reinterpret_cast<float*>(ring);
    __syncwarp();
#pragma unroll
    for (int i = 0; i < TILES; ++i)
#pragma unroll
        for (int n = 0; n < TOKEN_TILES; ++n)
#pragma unroll
            for (int e = 0; e < 4; ++e)
                sums[i * TILE_FLOATS + (8 * n + 2 * (lane & 3) + (e & 1)) * 16 + (lane >> 2) + 8 * (e >> 1)] = acc[i][n][e];
    __syncthreads();
    const int fours = R * 4, work = shape.tokens * fours, k_bytes = shape.row_warps * RING_BYTES;
    auto sums_at = [&](int token, int row) {  // of four rows of a token, in the ring of the first warp that has a part of them
        return shape.x_bytes + (row >> 4) / TILES * RING_BYTES + ((row >> 4) % TILES * TILE_FLOATS + token * 16 + (row & 15)) * 4;
    };
    for (int o = threadIdx.x; o < work; o += blockDim.x) {
        const int token = o / fours, row = 4 * (o - token * fours);
        float4* at = reinterpret_cast<float4*>(shared + sums_at(token, row));
        float total[4] = {};
        for (int k = 0; k < shape.k_warps; ++k) {
            const float4 v = at[k * k_bytes / 16];
            total[0] += v.x, total[1] += v.y, total[2] += v.z, total[3] += v.w;
        }
        if (shape.splits == 1) store_four(w, y, y_stride, token, first_tile * 16 + row, total);
        else *at = make_float4(total[0], total[1], total[2], total[3]);
    }
    if (shape.splits == 1) return;
    cluster_sync();
    for (int o = threadIdx.x + blockDim.x * split; o < work; o += blockDim.x * shape.splits) {
        const int token = o / fours, row = 4 * (o - token * fours);
        float total[4] = {};
        for (int s = 0; s < shape.splits; ++s) add_remote(total, x_shared + sums_at(token, row), s);
        store_four(w, y, y_stride, token, first_tile * 16 + row, total);
    }
    cluster_sync();  // nobody leaves while its sums are being read
}

}  // namespace rosaq
