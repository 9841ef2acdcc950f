// Entry points, plain C, one library per (bits, runs per group, type of x): see cuda.py, which builds and calls them.
#include "batch.cuh"
#include "decode.cuh"
#include "dequantize.cuh"

#include <cudaTypedefs.h>

using namespace rosaq;

namespace {

template <typename... Expected, typename... Given>
int launch(void (*kernel)(Expected...), dim3 grid, int threads, int shared_bytes, dim3 cluster, bool overlap, cudaStream_t stream, Given... given) {
    cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes);
    if (error != cudaSuccess) return error;
    cudaLaunchConfig_t config = {};
    config.gridDim = grid, config.blockDim = dim3(threads), config.dynamicSmemBytes = shared_bytes, config.stream = stream;
    cudaLaunchAttribute attributes[2];
    config.attrs = attributes;
    if (overlap) {
        attributes[config.numAttrs].id = cudaLaunchAttributeProgrammaticStreamSerialization;
        attributes[config.numAttrs++].val.programmaticStreamSerializationAllowed = 1;
    }
    if (cluster.x * cluster.y > 1) {
        attributes[config.numAttrs].id = cudaLaunchAttributeClusterDimension;
        attributes[config.numAttrs++].val.clusterDim = {cluster.x, cluster.y, 1};
    }
    return cudaLaunchKernelEx(&config, kernel, given...);
}

int blocks_of(int tiles, int each) { return (tiles + each - 1) / each; }

int tensor_map(CUtensorMap* map, CUtensorMapDataType type, int dimensions, const void* base, const cuuint64_t* sizes, const cuuint64_t* strides,
               const cuuint32_t* box, CUtensorMapSwizzle swizzle) {
    static PFN_cuTensorMapEncodeTiled_v12000 encode = nullptr;
    if (!encode) {
        cudaDriverEntryPointQueryResult found;
        void* function = nullptr;
        const cudaError_t error = cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function, 12000, cudaEnableDefault, &found);
        if (error != cudaSuccess || found != cudaDriverEntryPointSuccess) return 1;
        encode = reinterpret_cast<PFN_cuTensorMapEncodeTiled_v12000>(function);
    }
    const cuuint32_t steps[4] = {1, 1, 1, 1};
    return encode(map, type, dimensions, const_cast<void*>(base), sizes, strides, box, steps, CU_TENSOR_MAP_INTERLEAVE_NONE, swizzle,
                  CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE) != CUDA_SUCCESS;
}

// Items of `bytes` bytes per tile, in `parts` parts each, from `offset` bytes into the stream on; a box is `runs` items of R tiles.
int weight_map(CUtensorMap* map, const Weights* w, int64_t offset, int bytes, int parts, int items, unsigned R, unsigned runs) {
    const cuuint64_t wide = bytes / 8 / parts, tiles = w->tiles, sizes[4] = {wide, cuuint64_t(parts), tiles, cuuint64_t(items)};
    const cuuint64_t strides[3] = {wide * 8, cuuint64_t(bytes), tiles * bytes};
    const cuuint32_t box[4] = {cuuint32_t(wide), cuuint32_t(parts), R, runs};
    return tensor_map(map, CU_TENSOR_MAP_DATA_TYPE_FLOAT64, 4, w->stream + offset, sizes, strides, box, CU_TENSOR_MAP_SWIZZLE_NONE);
}

// x as (32 channels, tokens, runs of a block, blocks) from channel `offset` on, or, wide, in pairs of runs; a box is `runs` runs of a tile of tokens.
int x_map(CUtensorMap* map, const Weights* w, const void* x, int offset, int64_t x_stride, int tokens, int token_tile, int per_block, int runs, bool wide) {
    const int inner = runs < per_block ? runs : per_block;
    const cuuint32_t channels = wide ? 64 : 32;
    const cuuint64_t sizes[4] = {channels, cuuint64_t(tokens), cuuint64_t(per_block >> wide), cuuint64_t(w->blocks)};
    const cuuint64_t strides[3] = {cuuint64_t(x_stride) * 2, channels * 2, cuuint64_t(w->block_size) * 2};
    const cuuint32_t box[4] = {channels, cuuint32_t(token_tile), cuuint32_t(inner >> wide), cuuint32_t(runs / inner)};
    return tensor_map(map, BF16 ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 : CU_TENSOR_MAP_DATA_TYPE_FLOAT16, 4, static_cast<const uint16_t*>(x) + offset, sizes,
                      strides, box, wide ? CU_TENSOR_MAP_SWIZZLE_128B : CU_TENSOR_MAP_SWIZZLE_64B);
}

}  // namespace

extern "C" {

int rosaq_decode(const Weights* w, const void* x, int64_t x_stride, void* y, int64_t y_stride, DecodeShape shape, int variant, int overlap,
                 cudaStream_t stream) {
    const int warps = shape.row_warps * shape.k_warps, tiles = variant == 1 ? 1 : 2, depth = variant == 1 ? 4 : variant;
    const int shared_bytes = shape.x_bytes + warps * tiles * depth * SLOT_BYTES;
    const dim3 cluster(shape.sharing, shape.splits);
    const dim3 grid(blocks_of(w->tiles, shape.row_warps * tiles * cluster.x) * cluster.x, cluster.y);
    auto few = variant == 1 ? decode<1, 1, 4> : variant == 2 ? decode<1, 2, 2> : decode<1, 2, 3>;
    auto more = variant == 1 ? decode<2, 1, 4> : variant == 2 ? decode<2, 2, 2> : decode<2, 2, 3>;
    return launch(shape.tokens <= 8 ? few : more, grid, (warps + FETCHERS) * 32, shared_bytes, cluster, overlap, stream, *w,
                  static_cast<const uint16_t*>(x), x_stride, static_cast<uint16_t*>(y), y_stride, shape);
}

int rosaq_batch(const Weights* w, const void* x, int64_t x_stride, void* y, int64_t y_stride, BatchShape shape, int token_tile, int overlap,
                cudaStream_t stream) {
    const unsigned R = shape.row_tiles;
    const bool wide = shape.wide = w->q_runs_per_block % 2 == 0 && (!w->s_items || w->s_runs_per_block % 2 == 0);
    BatchMaps maps;
    int failed = weight_map(&maps.codes, w, 0, CODE_BYTES, CODE_PARTS, w->q_items, R, 1);
    failed |= weight_map(&maps.scales, w, w->scales_offset, SCALE_BYTES, 1, w->q_items, R, 1);
    failed |= x_map(&maps.q_x, w, x, w->q_offset, x_stride, shape.tokens, token_tile, w->q_runs_per_block, RUNS, wide);
    if (w->s_items) {
        failed |= weight_map(&maps.salient, w, w->salient_offset, w->s_item_bytes, 1, w->s_items, R, SALIENT_RUNS);
        failed |= x_map(&maps.s_x, w, x, w->s_offset, x_stride, shape.tokens, token_tile, w->s_runs_per_block, SALIENT_RUNS, wide);
    }
    if (failed) return cudaErrorInvalidValue;
    const dim3 grid(blocks_of(w->tiles, R), shape.splits, blocks_of(shape.tokens, token_tile));
    const bool twice = shape.row_tiles == 8 * shape.warp_groups;
    auto kernel = token_tile == 32 ? (twice ? batch<32, 2> : batch<32, 1>) : token_tile == 64 ? (twice ? batch<64, 2> : batch<64, 1>) : batch<128, 1>;
    return launch(kernel, grid, (shape.warp_groups + 1) * 128, shape.slots * (shape.slot_bytes + 16), dim3(1, shape.splits), overlap, stream, *w, maps,
                  static_cast<uint16_t*>(y), y_stride, shape);
}

int rosaq_dequantize(const Weights* w, void* weight, int64_t columns, cudaStream_t stream) {
    const dim3 grid(blocks_of(w->q_items + w->s_items, 8), w->tiles);
    dequantize<<<grid, 256, 0, stream>>>(*w, static_cast<uint16_t*>(weight), columns);
    return cudaGetLastError();
}

const char* rosaq_error(int code) { return cudaGetErrorString(static_cast<cudaError_t>(code)); }
}
