// What a warp multiplies in decoding: blocks of codes of its row tiles by x in shared memory (see decode.cuh), with m16n8k16 instructions.
#pragma once
#include "format.cuh"

namespace rosaq {

__device__ inline void mma(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    if constexpr (BF16)
        asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
                     : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
                     : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
    else
        asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
                     : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
                     : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

__device__ inline void load_matrices(uint32_t (&r)[4], uint32_t address) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];" : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(address)
                 : "memory");
}

constexpr int SLOT_BYTES = CODE_BYTES + SCALE_BYTES > 1024 ? CODE_BYTES + SCALE_BYTES : 1024;  // a quantized item, or a salient one

// Codes are multiplied as they come out of the words: as float16 numbers too small to be normal (bit 0 is 2^-24; the tensor cores take them exactly),
// or set into the mantissa of 128 for bfloat16. Rows g + 8 come out ODD times too large. sum (code - zero) x = sum code x - zero sum x, and
// the sums of x over a group are one more product, in the same units. A row's unit is put right at the end.
constexpr uint32_t CODE_MAGIC = BF16 ? MAGIC : 0u, X_FACTOR = BF16 ? ONES : 0x00010001u;
constexpr float UNIT = BF16 ? 1.f : 0x1p-24f;
__device__ inline float unit_of(int odd) { return odd ? UNIT * ODD : UNIT; }

// A unit's codes as A operands, without scale or zero point.
__device__ inline void place(const uint32_t* raw, uint32_t (&a)[4][4]) {
    if constexpr (BITS != 8) extract(raw, CODE_MAGIC, a);
    else {
#pragma unroll
        for (int i = 0; i < 8; ++i) {  // word i: row i % 2 of step i / 2
            uint32_t(&to)[4] = a[i / 2];
            if constexpr (BF16) expand_bytes(raw[i], 0u, to[i % 2], to[2 + i % 2]);
            else to[i % 2] = __byte_perm(raw[i], 0u, 0x4140), to[2 + i % 2] = __byte_perm(raw[i], 0u, 0x4342);
        }
    }
}
// Scales and zero points of a group for rows g, g + 8: minus what the codes of each row carry too much, in units of the row's codes.
struct Rows {
    float scale[2], minus[2];
};
__device__ inline Rows rows_of(uint2 stored) {
    const __half2 scales = reinterpret_cast<const __half2&>(stored.x);
    uint32_t minus = stored.y;
    constexpr uint32_t LOG = ODD == 16 ? 4 : ODD == 8 ? 3 : ODD == 4 ? 2 : 0;  // times 2^n is n more in the exponent
    if constexpr (!BF16) minus = fma2(minus, 0x3c003c00u + (LOG << 26), 0x64006400u + (LOG << 26));  // (-1024 - zero + 1024) ODD
    else if constexpr (ODD != 1) minus = fma2(minus, 0x3f803f80u + (LOG << 23), ODD == 8 ? 0x44600000u : 0x43c00000u);  // (-128 - zero) ODD + 128 (ODD - 1)
    return {{__low2float(scales), __high2float(scales)}, {widen(uint16_t(minus)), widen(uint16_t(minus >> 16))}};
}

// Where an item's runs are in a token's row of x in shared memory (see decode.cuh).
constexpr int ITEM_BYTES = UNITS == 3 ? 512 : RUNS * 64;
__device__ inline int place_in_item(int run) { return UNITS == 3 ? run * 64 + run / 3 * 64 + 64 : run * 64; }

// A run of x as B operands, two registers for each token tile and step: four registers of a step (16 tokens) or of the run (8) come together.
template <int TOKEN_TILES>
__device__ inline void load_x(uint32_t (&b)[TOKEN_TILES][4], const uint32_t (&x_at)[TOKEN_TILES], int offset) {
#pragma unroll
    for (int i = 0; i < TOKEN_TILES; ++i) load_matrices(b[i], x_at[i] + offset);
}
template <int TOKEN_TILES>
__device__ inline const uint32_t* x_pair(const uint32_t (&b)[TOKEN_TILES][4], int token_tile, int step) {
    return TOKEN_TILES == 2 ? b[step] + 2 * token_tile : b[0] + 2 * step;
}

// acc += scale * ((codes - zero) times x) for one quantized block of TILES row tiles, whose first tile lies at `data`.
template <int TOKEN_TILES, int TILES>
__device__ inline void multiply_block(const uint8_t* data, int lane, const uint32_t (&x_at)[TOKEN_TILES], float (&acc)[TILES][TOKEN_TILES][4]) {
    uint32_t words[TILES][WORDS];
#pragma unroll
    for (int i = 0; i < TILES; ++i) load_words<WORDS>(data + i * SLOT_BYTES, lane, words[i], FromShared{});
    float sum[TILES][TOKEN_TILES][4], x_sum[4];
    // As the A operand, the registers of x are: of 8 tokens, channels 0 to 7 and 16 to 23 of the run in rows 0 to 7, the others below; of 16, a step's
    // halves below one another for tokens 0 to 7 (k < 8) and 8 to 15 (k >= 8), told apart by what even and odd columns multiply.
    const bool odd = lane & 4;
    const uint32_t factor[2] = {TOKEN_TILES == 2 && odd ? 0u : X_FACTOR, TOKEN_TILES == 2 && !odd ? 0u : X_FACTOR};
#pragma unroll
    for (int u = 0; u < UNITS; ++u) {
        uint32_t a[TILES][4][4];
#pragma unroll
        for (int i = 0; i < TILES; ++i) place(words[i] + u * RAW, a[i]);
#pragma unroll
        for (int h = 0; h < 2; ++h) {
            const int run = 2 * u + h;
            uint32_t b[TOKEN_TILES][4];
            load_x<TOKEN_TILES>(b, x_at, place_in_item(run));
            if (run % GROUP_RUNS == 0) {
#pragma unroll
                for (int e = 0; e < 4; ++e) {
                    x_sum[e] = 0.f;
#pragma unroll
                    for (int i = 0; i < TILES * TOKEN_TILES; ++i) sum[i / TOKEN_TILES][i % TOKEN_TILES][e] = 0.f;
                }
            }
#pragma unroll
            for (int n = 0; n < TOKEN_TILES; ++n) mma(x_sum, b[n], factor[0], factor[1]);
#pragma unroll
            for (int j = 0; j < 2; ++j)
#pragma unroll
                for (int i = 0; i < TILES; ++i)
#pragma unroll
                    for (int n = 0; n < TOKEN_TILES; ++n) mma(sum[i][n], a[i][2 * h + j], x_pair<TOKEN_TILES>(b, n, j)[0], x_pair<TOKEN_TILES>(b, n, j)[1]);
            if (run % GROUP_RUNS < GROUP_RUNS - 1) continue;
            // Lane 4 g + t has the sums of tokens g and g + 8, and needs those of tokens 2 t and 2 t + 1.
            float of_x[TOKEN_TILES][2];
            const int from = 8 * (lane & 3);
#pragma unroll
            for (int e = 0; e < 2; ++e) {
                of_x[0][e] = __shfl_sync(~0u, x_sum[0] + x_sum[2], from + 4 * e);
                if constexpr (TOKEN_TILES == 2) of_x[1][e] = __shfl_sync(~0u, x_sum[1] + x_sum[3], from + 4 * e);
            }
#pragma unroll
            for (int i = 0; i < TILES; ++i) {
                const Rows rows = rows_of(*reinterpret_cast<const uint2*>(data + i * SLOT_BYTES + CODE_BYTES + run / GROUP_RUNS * GROUP_BYTES + 8 * (lane >> 2)));
#pragma unroll
                for (int n = 0; n < TOKEN_TILES; ++n)
#pragma unroll
                    for (int e = 0; e < 4; ++e) acc[i][n][e] += rows.scale[e >> 1] * (sum[i][n][e] + rows.minus[e >> 1] * of_x[n][e & 1]);
            }
        }
    }
}

}  // namespace rosaq
