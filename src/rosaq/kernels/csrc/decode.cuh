// Few tokens (M <= 16): every warp streams its own row tiles.
//
// A CTA owns R = `row_warps` * TILES row tiles and, in a cluster of `splits` times `sharing` CTAs, one stretch of their items; row_warps x k_warps of its
// warps multiply, each TILES tiles and a stretch of the CTA's items. Such a warp copies DEPTH items per tile ahead (cp.async) into its own ring in shared
// memory and needs no other warp until the sums are added up, but for x, which four more warps bring in chunks (activations.cuh); it waits for each chunk
// only when it gets there. Weights are fetched before the previous kernel of the stream has finished; x, which that kernel may be writing, is read after.
//
// The sums are added in a fixed order: results do not change from run to run.
#pragma once
#include "activations.cuh"

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

constexpr int most_warps(int token_tiles, int tiles) { return tiles == 1 ? 24 : token_tiles == 1 ? 20 : 16; }  // that multiply

template <int TOKEN_TILES, int TILES, int DEPTH>
__global__ void __launch_bounds__(32 * (FETCHERS + most_warps(TOKEN_TILES, TILES)), 1)
    decode(const __grid_constant__ Weights w, const uint16_t* __restrict__ x, int64_t x_stride, uint16_t* __restrict__ y, int64_t y_stride,
           const __grid_constant__ DecodeShape shape) {
    constexpr int STAGE_BYTES = TILES * SLOT_BYTES, RING_BYTES = DEPTH * STAGE_BYTES, TILE_FLOATS = 16 * 8 * TOKEN_TILES;
    extern __shared__ __align__(1024) uint8_t shared[];
    const int lane = threadIdx.x & 31, warp = __shfl_sync(~0u, threadIdx.x >> 5, 0);  // the compiler sees that it is one value per warp
    const int split = blockIdx.y, R = shape.row_warps * TILES, first_tile = blockIdx.x * R, fetcher_warp = shape.row_warps * shape.k_warps;
    const uint16_t* share = shape.begin + split * shape.k_warps;
    __shared__ uint64_t x_ready[MOST_BARRIERS];  // per part of the CTA's items and chunk of x
    const int barriers = shape.k_warps * shape.chunks;
    if (threadIdx.x < barriers) {
        barrier_init(shared_address(x_ready + threadIdx.x), shape.way == BY_THREADS ? 32 * FETCHERS : 1);
        barrier_init_fence();
    }
    if (shape.sharing > 1) cluster_arrive();
    else __syncthreads();
    let_next_start();
    const uint32_t x_shared = shared_address(shared), x_to = x_shared - place_of(w, share[0]);  // where item 0 is or would be
    uint8_t* ring = shared + shape.x_bytes + warp * RING_BYTES;

    if (warp >= fetcher_warp) {
        wait_for_previous();
        if (shape.sharing > 1) cluster_wait();  // the barriers of all are there
        fetch_x(w, shape, x, x_stride, share, x_to, shared_address(x_ready), warp - fetcher_warp);
    } else {
        const int row_warp = warp % shape.row_warps, k_warp = warp / shape.row_warps, my_tile = first_tile + row_warp * TILES;
        const int begin = share[k_warp], share_end = share[k_warp + 1], end = my_tile < w.tiles ? share_end : begin, q_end = min(end, w.q_items);
        const bool bytes = w.salient_scales != nullptr;
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
        if (shape.sharing > 1) cluster_wait();

        // Addresses that this lane gives ldmatrix: of 8 tokens, piece lane / 8 of token lane % 8; of 16, the pieces of a step for tokens lane % 8, then for
        // tokens 8 + lane % 8 (the last token again where there are fewer).
        const int token = min((lane & 7) + (TOKEN_TILES == 2 ? lane >> 4 << 3 : 0), shape.tokens - 1);
        uint32_t x_at[TOKEN_TILES];
#pragma unroll
        for (int i = 0; i < TOKEN_TILES; ++i) {
            x_at[i] = x_to + place_of(w, begin) + token * shape.pitch + 16 * (TOKEN_TILES == 2 ? 2 * i + (lane >> 3 & 1) : lane >> 3);
        }
        float acc[TILES][TOKEN_TILES][4] = {};
        int item = begin, next_chunk = begin, slot = 0;
        const int chunk = (share_end - begin + shape.chunks - 1) / shape.chunks;  // items per chunk
        uint32_t ready = shared_address(x_ready + k_warp * shape.chunks);
        auto wait = [&]() {
            if (item == next_chunk) {
                barrier_wait(ready, 0);
                ready += 8, next_chunk += chunk;
            }
            copy_wait<DEPTH - 1>();
            __syncwarp();
        };
        while (item < q_end) {
#pragma unroll
            for (slot = 0; slot < DEPTH; ++slot) {
                if (item >= q_end) break;
                wait();
                multiply_block<TOKEN_TILES, TILES>(ring + slot * STAGE_BYTES, lane, x_at, acc);
#pragma unroll
                for (int i = 0; i < TOKEN_TILES; ++i) x_at[i] += ITEM_BYTES;
                __syncwarp();
                fetch(slot, item + DEPTH);
                ++item;
            }
        }
        const bool whole = shape.way == WHOLE;
        if (whole && item < end) {  // the precise channels came with the quantized ones of their blocks
#pragma unroll
            for (int i = 0; i < TOKEN_TILES; ++i) x_at[i] += (item - w.q_items) * 256 - place_of(w, item);
            for (int b = 0; b < barriers; ++b) barrier_wait(shared_address(x_ready + b), 0);
        }
        float sum[TILES][TOKEN_TILES][4] = {};
        for (slot %= DEPTH; item < end; ++item) {
            wait();
            uint32_t b[TOKEN_TILES][4];
            load_x<TOKEN_TILES>(b, x_at, 0);
#pragma unroll
            for (int i = 0; i < TOKEN_TILES; ++i) x_at[i] += whole ? 256 : 64;
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
        float* sums = reinterpret_cast<float*>(ring);
        __syncwarp();
#pragma unroll
        for (int i = 0; i < TILES; ++i)
#pragma unroll
            for (int n = 0; n < TOKEN_TILES; ++n)
#pragma unroll
                for (int e = 0; e < 4; ++e)
                    sums[i * TILE_FLOATS + (8 * n + 2 * (lane & 3) + (e & 1)) * 16 + (lane >> 2) + 8 * (e >> 1)] = acc[i][n][e];
    }
    if (shape.sharing > 1 && threadIdx.x < barriers) barrier_wait(shared_address(x_ready + threadIdx.x), 0);  // what others fetch for this CTA is there
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
    const int rank = shape.sharing == 1 ? 0 : blockIdx.x % shape.sharing;
    for (int o = threadIdx.x + blockDim.x * split; o < work; o += blockDim.x * shape.splits) {
        const int token = o / fours, row = 4 * (o - token * fours);
        float total[4] = {};
        for (int s = 0; s < shape.splits; ++s) add_remote(total, x_shared + sums_at(token, row), s * shape.sharing + rank);
        store_four(w, y, y_stride, token, first_tile * 16 + row, total);
    }
    cluster_sync();  // nobody leaves while its sums are being read
}

}  // namespace rosaq
