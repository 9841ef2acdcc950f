// The repacked weight, and how one warp turns it into tensor-core operands.
//
// Outputs are cut into row tiles of 16, inputs into runs of 32 channels. A warp multiplies with m16n8k16 instructions (or, four warps
// together, with wgmma m64nNk16): the weights are the 16-row A operand, the tokens its columns. The stream is
//
//   q_items times `tiles` blocks of codes, UNITS units of 64 channels each (every block starts at a multiple of 128 bytes, which the copies like);
//   q_items times `tiles` times GROUPS groups of 64 bytes: for g = 0..7 the scales (float16) of rows g and g + 8, then their offsets (type of x);
//   s_items times `tiles` salient runs, float16 / bfloat16 (1024 bytes) or 8-bit codes (512 bytes);
//
// each part from a multiple of 128 bytes on, zeros after the last. What all row tiles need of the same channels lies together, since that is about
// what the multiprocessors read at the same time: memory is fastest where neighbours are read together.
//
// In a unit, lane 4 g + t holds rows g and g + 8 and channels 16 j + 2 t + {0, 1, 8, 9} of each step j = 0..3, that is 16 pairs
// i = 4 j + p of neighbouring channels, p = 0..3 being the registers a0..a3 of the A operand (p odd: row g + 8):
//
//   4 bits: one word per step, pair p at bit 4 p of both 16-bit halves;
//   3 bits: three words with five pairs each, at bits 0, 3, 6, 9, 12 of both halves: 0 1 2 3 4, 6 5 8 7 10, 12 9 14 11 13 (so that few shifts
//     bring even pairs to bit 0 and odd ones to bit 3); pair 15 lies in bit 15 of the three;
//   2 bits: one word per two steps, pair p of the first at bit 2 p + 2 of both halves, of the second at bit 2 p + 10, its last at bit 0: a code counts
//     four, so that pairs p even belong at bit 2, and p odd, four times as large, at bit 4;
//   8 bits: two words per step, one per row, bytes in channel order.
//
// The words of a block, unit after unit, lie in planes: four words of every lane, next to each other, then the next four; the last plane
// may have one or two. Where a weight itself is needed (batches, prefill), codes become numbers by being set into the mantissa of a constant
// (1024 for float16, 128 for bfloat16); adding the offset, minus that constant and the zero point, is exact in both types.
#pragma once
#include <cuda.h>
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#include <stdint.h>

#ifndef ROSAQ_BITS
#define ROSAQ_BITS 4
#endif
#ifndef ROSAQ_GROUP_RUNS
#define ROSAQ_GROUP_RUNS 4
#endif
#ifndef ROSAQ_BF16
#define ROSAQ_BF16 0
#endif

namespace rosaq {

constexpr int BITS = ROSAQ_BITS;              // 2, 3, 4 or 8
constexpr int GROUP_RUNS = ROSAQ_GROUP_RUNS;  // runs that share a scale: 1, 2, 3 or 4
constexpr bool BF16 = ROSAQ_BF16;
constexpr int UNITS = GROUP_RUNS == 3 ? 3 : 2;           // per block
constexpr int RUNS = 2 * UNITS;                          // per block
constexpr int GROUPS = RUNS / GROUP_RUNS;                // per block
constexpr int RAW = BITS;                                // words of a unit per lane
constexpr int WORDS = UNITS * RAW;                       // words of a block per lane
constexpr int CODE_BYTES = WORDS * 128;                  // of a block
constexpr int GROUP_BYTES = 64, SCALE_BYTES = GROUPS * GROUP_BYTES;

// One prepared layer. Mirrored field by field by `Weights` in cuda.py.
struct Weights {
    const uint8_t* stream;
    const __half* salient_scales;  // (16 tiles,) or null: salient channels are float16 / bfloat16
    const void* bias;              // (out_features,) in the type of x, or null
    int64_t scales_offset, salient_offset;  // where these parts of the stream start
    int32_t out_features, tiles, q_items, s_items, s_item_bytes;
    // Where runs lie in a row of x: run r of a kind is in block r / runs_per_block, 32 (r % runs_per_block) channels after `offset`.
    int32_t blocks, block_size, q_runs_per_block, q_valid, q_offset, s_runs_per_block, s_valid, s_offset;
};

// Items are the quantized blocks of a row tile, then its salient runs. First run that an item meets:
__host__ __device__ inline int item_run(const Weights& w, int i) { return i <= w.q_items ? i * RUNS : w.q_items * RUNS + (i - w.q_items); }
__device__ inline const uint8_t* codes_of(const Weights& w, int item, int tile) { return w.stream + (int64_t(item) * w.tiles + tile) * CODE_BYTES; }
__device__ inline const uint8_t* scales_of(const Weights& w, int item, int tile) {
    return w.stream + w.scales_offset + (int64_t(item) * w.tiles + tile) * SCALE_BYTES;
}
__device__ inline const uint8_t* salient_of(const Weights& w, int item, int tile) {  // items here start at the first salient one
    return w.stream + w.salient_offset + (int64_t(item) * w.tiles + tile) * w.s_item_bytes;
}
// r / divisor for 0 <= r < 65536, given 2^32 / divisor rounded up (0 for divisor 1).
__device__ inline int divide(int r, uint32_t reciprocal) { return reciprocal ? int(__umulhi(uint32_t(r), reciprocal)) : r; }

// ---- arithmetic on pairs of the activation type, as 32-bit registers ----

__device__ inline uint32_t add2(uint32_t a, uint32_t b) {
    uint32_t d;
    if constexpr (BF16) asm("add.rn.bf16x2 %0, %1, %2;" : "=r"(d) : "r"(a), "r"(b));
    else asm("add.rn.f16x2 %0, %1, %2;" : "=r"(d) : "r"(a), "r"(b));
    return d;
}
__device__ inline uint32_t mul2(uint32_t a, uint32_t b) {
    uint32_t d;
    if constexpr (BF16) asm("mul.rn.bf16x2 %0, %1, %2;" : "=r"(d) : "r"(a), "r"(b));
    else asm("mul.rn.f16x2 %0, %1, %2;" : "=r"(d) : "r"(a), "r"(b));
    return d;
}
__device__ inline uint32_t fma2(uint32_t a, uint32_t b, uint32_t c) {
    uint32_t d;
    if constexpr (BF16) asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(d) : "r"(a), "r"(b), "r"(c));
    else asm("fma.rn.f16x2 %0, %1, %2, %3;" : "=r"(d) : "r"(a), "r"(b), "r"(c));
    return d;
}
__device__ inline uint32_t twice(float v) {  // v in both halves
    if constexpr (BF16) {
        __nv_bfloat162 p = __float2bfloat162_rn(v);
        return reinterpret_cast<uint32_t&>(p);
    } else {
        __half2 p = __float2half2_rn(v);
        return reinterpret_cast<uint32_t&>(p);
    }
}
__device__ inline uint16_t narrow(float v) {
    if constexpr (BF16) return __bfloat16_as_ushort(__float2bfloat16_rn(v));
    else return __half_as_ushort(__float2half_rn(v));
}
__device__ inline float widen(uint16_t v) {
    if constexpr (BF16) return __bfloat162float(__ushort_as_bfloat16(v));
    else return __half2float(__ushort_as_half(v));
}

__device__ inline uint32_t set_bits(uint32_t word, uint32_t mask, uint32_t magic) {  // (word & mask) | magic, as one instruction
    uint32_t d;
    asm("lop3.b32 %0, %1, %2, %3, 0xea;" : "=r"(d) : "r"(word), "r"(mask), "r"(magic));
    return d;
}

// ---- scales and zero points of a group, for the two rows g and g + 8 of a lane ----

struct Group {
    uint32_t scales;     // float16 of both rows
    uint32_t offset[2];  // minus (constant + zero), the constant as the codes of this row carry it

    __device__ float scale(int row) const {
        const __half2 pair = reinterpret_cast<const __half2&>(scales);
        return row ? __high2float(pair) : __low2float(pair);
    }
};

// The bits of 1024 (float16) or 128 (bfloat16), and of 1, twice.
constexpr uint32_t MAGIC = BF16 ? 0x43004300u : 0x64006400u;
constexpr uint32_t ONES = BF16 ? 0x3f803f80u : 0x3c003c00u;

// The codes of odd pairs (row g + 8) come out this many times too large.
constexpr int ODD = BITS == 2 ? 4 : BITS == 3 ? 8 : BITS == 4 && !BF16 ? 16 : 1;

__device__ inline Group make_group(uint2 stored) {
    constexpr float CONSTANT = BF16 ? 128.f : 1024.f;
    Group group;
    group.scales = stored.x;
    group.offset[0] = __byte_perm(stored.y, 0, 0x1010), group.offset[1] = __byte_perm(stored.y, 0, 0x3232);
    if constexpr (ODD != 1) group.offset[1] = add2(group.offset[1], twice(CONSTANT - CONSTANT / ODD));
    return group;
}

// ---- codes to numbers ----

// 8-bit codes of one word (one row, channels 2 t + {0, 1, 8, 9}) minus the zero point: two registers.
__device__ inline void expand_bytes(uint32_t word, uint32_t offset, uint32_t& low, uint32_t& high) {
    if constexpr (!BF16) {
        low = add2(__byte_perm(word, MAGIC, 0x5150), offset);
        high = add2(__byte_perm(word, MAGIC, 0x5352), offset);
    } else {  // 8 bits do not fit bfloat16's mantissa: 16 high + (low - zero), each step exact
        const uint32_t minus = twice(-128.f), sixteen = twice(16.f);
#pragma unroll
        for (int h = 0; h < 2; ++h) {
            const uint32_t pair = h ? __byte_perm(word, 0, 0x4342) : __byte_perm(word, 0, 0x4140);
            const uint32_t fine = add2(add2(set_bits(pair, 0x000f000fu, MAGIC), minus), offset);
            const uint32_t coarse = add2(set_bits(pair >> 4, 0x000f000fu, MAGIC), minus);
            (h ? high : low) = fma2(coarse, sixteen, fine);
        }
    }
}

// Codes of a unit as A operands a[step][register], each half | magic; the odd registers hold ODD times the code. 2, 3 and 4 bits.
__device__ inline void extract(const uint32_t* raw, uint32_t magic, uint32_t (&a)[4][4]) {
    if constexpr (BITS == 4) {
#pragma unroll
        for (int j = 0; j < 4; ++j) {
#pragma unroll
            for (int p = 0; p < 4; ++p) {
                if constexpr (BF16) a[j][p] = set_bits(raw[j] >> (4 * p), 0x000f000fu, magic);
                else a[j][p] = set_bits(p < 2 ? raw[j] : raw[j] >> 8, p & 1 ? 0x00f000f0u : 0x000f000fu, magic);
            }
        }
    } else if constexpr (BITS == 2) {
#pragma unroll
        for (int j = 0; j < 4; ++j)
#pragma unroll
            for (int p = 0; p < 4; ++p) {
                const uint32_t word = (j & 1) && p == 3 ? raw[j / 2] << 4 : raw[j / 2] >> (8 * (j & 1) + 4 * (p / 2));
                a[j][p] = set_bits(word, p & 1 ? 0x00300030u : 0x000c000cu, magic);
            }
    } else if constexpr (BITS == 3) {
        constexpr uint32_t EVEN = 0x00070007u, UNEVEN = 0x00380038u;
        constexpr int PAIRS[3][5] = {{0, 1, 2, 3, 4}, {6, 5, 8, 7, 10}, {12, 9, 14, 11, 13}};
#pragma unroll
        for (int k = 0; k < 3; ++k) {
#pragma unroll
            for (int at = 0; at < 5; ++at) {
                const int pair = PAIRS[k][at], shift = pair & 1 ? 3 * (at - 1) : 3 * at;
                a[pair / 4][pair % 4] = set_bits(raw[k] >> shift, pair & 1 ? UNEVEN : EVEN, magic);
            }
        }
        const uint32_t low = set_bits(raw[0] >> 12, 0x00080008u, magic), middle = set_bits(raw[1] >> 11, 0x00100010u, low);
        a[3][3] = set_bits(raw[2] >> 10, 0x00200020u, middle);
    }
}

// code - zero (4 code - zero at 2 bits) of a unit as A operands; `first` and `second` are the groups of its two runs.
__device__ inline void expand(const uint32_t* raw, const Group& first, const Group& second, uint32_t (&a)[4][4]) {
    if constexpr (BITS == 8) {
#pragma unroll
        for (int j = 0; j < 4; ++j) {
            const Group& group = j < 2 ? first : second;
            expand_bytes(raw[2 * j], group.offset[0], a[j][0], a[j][2]);
            expand_bytes(raw[2 * j + 1], group.offset[1], a[j][1], a[j][3]);
        }
    } else {
        const uint32_t factor = twice(1.f / ODD);
        extract(raw, MAGIC, a);
#pragma unroll
        for (int j = 0; j < 4; ++j) {
            const Group& group = j < 2 ? first : second;
#pragma unroll
            for (int p = 0; p < 4; ++p) a[j][p] = ODD != 1 && p & 1 ? fma2(a[j][p], factor, group.offset[1]) : add2(a[j][p], group.offset[p & 1]);
        }
    }
}

// A lane's words of a salient run as A operands of its two steps; 8-bit codes are stored plus 128 and come out without their scale.
__device__ inline void expand_salient(const uint32_t* words, bool bytes, uint32_t (&a)[2][4]) {
    if (!bytes) {
#pragma unroll
        for (int i = 0; i < 8; ++i) a[i / 4][i % 4] = words[i];
        return;
    }
    const uint32_t offset = twice(BF16 ? -128.f : -1152.f);
#pragma unroll
    for (int i = 0; i < 4; ++i) expand_bytes(words[i], offset, a[i / 2][i % 2], a[i / 2][2 + i % 2]);
}

// Words `from` to `to` of a lane out of the planes of a block of TOTAL words per lane; `get` loads 4, 2 or 1 words from an address.
template <int TOTAL, typename Get>
__device__ inline void load_words(const uint8_t* block, int lane, uint32_t* words, Get get) {
#pragma unroll
    for (int i = 0; i < TOTAL / 4; ++i) get.four(block + 512 * i + 16 * lane, words + 4 * i);
    constexpr int REST = TOTAL % 4, DONE = TOTAL / 4;
    if constexpr (REST == 2) get.two(block + 512 * DONE + 8 * lane, words + 4 * DONE);
    if constexpr (REST == 1) get.one(block + 512 * DONE + 4 * lane, words + 4 * DONE);
}
struct FromShared {
    __device__ void four(const uint8_t* p, uint32_t* w) const {
        const uint4 v = *reinterpret_cast<const uint4*>(p);
        w[0] = v.x, w[1] = v.y, w[2] = v.z, w[3] = v.w;
    }
    __device__ void two(const uint8_t* p, uint32_t* w) const {
        const uint2 v = *reinterpret_cast<const uint2*>(p);
        w[0] = v.x, w[1] = v.y;
    }
    __device__ void one(const uint8_t* p, uint32_t* w) const { *w = *reinterpret_cast<const uint32_t*>(p); }
};
struct FromGlobal {  // volatile: the compiler must not move these loads next to their use
    __device__ void four(const uint8_t* p, uint32_t* w) const {
        asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0,%1,%2,%3}, [%4];" : "=r"(w[0]), "=r"(w[1]), "=r"(w[2]), "=r"(w[3]) : "l"(p));
    }
    __device__ void two(const uint8_t* p, uint32_t* w) const {
        asm volatile("ld.global.nc.L1::no_allocate.v2.u32 {%0,%1}, [%2];" : "=r"(w[0]), "=r"(w[1]) : "l"(p));
    }
    __device__ void one(const uint8_t* p, uint32_t* w) const { asm volatile("ld.global.nc.L1::no_allocate.u32 %0, [%1];" : "=r"(*w) : "l"(p)); }
};

// ---- Hopper's copy engine and barriers ----

__device__ inline uint32_t shared_address(const void* p) { return uint32_t(__cvta_generic_to_shared(p)); }

__device__ inline void barrier_init(uint32_t bar, int count) { asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(bar), "r"(count)); }
__device__ inline void barrier_init_fence() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }
__device__ inline void barrier_expect(uint32_t bar, uint32_t bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(bar), "r"(bytes) : "memory");
}
__device__ inline void barrier_arrive(uint32_t bar) { asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(bar) : "memory"); }
__device__ inline void barrier_wait(uint32_t bar, uint32_t parity) {
    asm volatile(
        "{\n.reg .pred done;\nagain:\nmbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n@done bra finished;\nbra again;\nfinished:\n}"
        ::"r"(bar), "r"(parity) : "memory");
}
// Programmatic dependent launch: the next kernel of the stream may start; wait until the previous one has finished and is visible.
__device__ inline void let_next_start() { asm volatile("griddepcontrol.launch_dependents;" ::: "memory"); }
__device__ inline void wait_for_previous() { asm volatile("griddepcontrol.wait;" ::: "memory"); }

__device__ inline void cluster_arrive() { asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory"); }
__device__ inline void cluster_wait() { asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory"); }
__device__ inline void cluster_sync() { cluster_arrive(), cluster_wait(); }
__device__ inline uint32_t remote_address(uint32_t address, int rank) {
    uint32_t d;
    asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(d) : "r"(address), "r"(rank));
    return d;
}

// Four neighbouring outputs of one token, from `out` on, with the bias, to y; outputs that do not exist are left out.
__device__ inline void store_four(const Weights& w, uint16_t* y, int64_t y_stride, int token, int out, const float (&total)[4]) {
    if (out >= w.out_features) return;
    float v[4];
#pragma unroll
    for (int e = 0; e < 4; ++e) v[e] = total[e] + (w.bias && out + e < w.out_features ? widen(static_cast<const uint16_t*>(w.bias)[out + e]) : 0.f);
    uint16_t* to = y + token * y_stride + out;
    if (out + 4 <= w.out_features && (reinterpret_cast<uintptr_t>(to) & 7) == 0) {
        *reinterpret_cast<uint2*>(to) = make_uint2(narrow(v[0]) | uint32_t(narrow(v[1])) << 16, narrow(v[2]) | uint32_t(narrow(v[3])) << 16);
    } else {
        for (int e = 0; e < 4 && out + e < w.out_features; ++e) to[e] = narrow(v[e]);
    }
}
// total += four floats at `address` of CTA `rank` of the cluster.
__device__ inline void add_remote(float (&total)[4], uint32_t address, int rank) {
    float v[4];
    asm volatile("ld.shared::cluster.v4.f32 {%0,%1,%2,%3}, [%4];" : "=f"(v[0]), "=f"(v[1]), "=f"(v[2]), "=f"(v[3]) : "r"(remote_address(address, rank)) : "memory");
#pragma unroll
    for (int e = 0; e < 4; ++e) total[e] += v[e];
}

}  // namespace rosaq
