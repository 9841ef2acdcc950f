// The stream back to a plain weight (N, K') in the type of x, channels in the order of x's runs; for prefill, followed by cuBLAS.
#pragma once
#include "format.cuh"

namespace rosaq {

// One warp per item of a row tile. `weight` is (out_features, columns): where a run of x starts is where its column starts.
__global__ void __launch_bounds__(256) dequantize(const __grid_constant__ Weights w, uint16_t* __restrict__ weight, int64_t columns) {
    __shared__ __align__(16) uint16_t tile[8][16][64 + 8];
    const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, g = lane >> 2, t = lane & 3;
    const int item = blockIdx.x * 8 + warp, row_tile = blockIdx.y;
    if (item >= w.q_items + w.s_items) return;
    const bool salient = item >= w.q_items, bytes = w.salient_scales != nullptr;
    uint32_t words[WORDS > 8 ? WORDS : 8];
    if (!salient) {
        load_words<WORDS>(codes_of(w, item, row_tile), lane, words, FromGlobal{});
    } else {
        const uint8_t* from = salient_of(w, item - w.q_items, row_tile);
        FromGlobal{}.four(from + 16 * lane, words);
        if (!bytes) FromGlobal{}.four(from + 512 + 16 * lane, words + 4);
    }
    auto group = [&](int run) {
        uint32_t pair[2];
        FromGlobal{}.two(scales_of(w, item, row_tile) + run / GROUP_RUNS * GROUP_BYTES + 8 * g, pair);
        return make_group(make_uint2(pair[0], pair[1]));
    };
#pragma unroll
    for (int u = 0; u < UNITS; ++u) {
        if (salient && u) break;
        uint32_t a[4][4];
        if (salient) {
            uint32_t s[2][4];
            expand_salient(words, bytes, s);
#pragma unroll
            for (int p = 0; p < 4; ++p) {
                const uint32_t scale = bytes ? twice(__half2float(w.salient_scales[row_tile * 16 + g + 8 * (p & 1)])) : ONES;
                for (int j = 0; j < 2; ++j) a[j][p] = mul2(s[j][p], scale), a[j + 2][p] = 0;
            }
        } else {
            const Group first = group(2 * u), second = group(2 * u + 1);
            expand(words + u * RAW, first, second, a);
#pragma unroll
            for (int j = 0; j < 4; ++j)
#pragma unroll
                for (int p = 0; p < 4; ++p) a[j][p] = mul2(a[j][p], twice((j < 2 ? first : second).scale(p & 1)));
        }
#pragma unroll
        for (int j = 0; j < 4; ++j)
#pragma unroll
            for (int p = 0; p < 4; ++p) *reinterpret_cast<uint32_t*>(&tile[warp][g + 8 * (p & 1)][16 * j + 8 * (p >> 1) + 2 * t]) = a[j][p];
        __syncwarp();
        for (int i = lane; i < 16 * 8; i += 32) {  // 16-byte pieces of 8 channels
            const int row = i >> 3, piece = i & 7, run = item_run(w, item) + 2 * u + (piece >> 2) - (salient ? w.q_items * RUNS : 0);
            if (salient && piece >= 4) continue;
            const int per_block = salient ? w.s_runs_per_block : w.q_runs_per_block, block = run / per_block;
            const int within = 32 * (run % per_block) + 8 * (piece & 3), out = row_tile * 16 + row;
            if (block >= w.blocks || within >= (salient ? w.s_valid : w.q_valid) || out >= w.out_features) continue;
            const int64_t column = int64_t(block) * w.block_size + (salient ? w.s_offset : w.q_offset) + within;
            *reinterpret_cast<uint4*>(weight + out * columns + column) = *reinterpret_cast<const uint4*>(&tile[warp][row][8 * piece]);
        }
        __syncwarp();
    }
}

}  // namespace rosaq
