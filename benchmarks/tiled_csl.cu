// The same product from tiles of values with their places (Tiled-CSL, the format of Flash-LLM, arXiv 2309.10285), as a yardstick: 4 bytes a kept
// weight. A tile of 64 x 64 is scattered into shared memory in the order of the fragments and multiplied from there.
#include "sparse_matmul.cu"

namespace sparse {
namespace {

constexpr int DENSE_BYTES = TILE * TILE * 2;

// ``values`` are words here, the value in the lower half and its place in the tile's fragments in the upper; ``starts`` count fours of them.
template <int TYPE, int NB>
__global__ void __launch_bounds__(THREADS) indexed_tiles(const TileArguments a) {
  const int thread = threadIdx.x, lane = thread % 32, warp = thread / 32;
  const int per_strip = static_cast<int>((a.cols + TILE - 1) / TILE), strip = blockIdx.x, split = blockIdx.y;
  const int first = per_strip * split / a.splits, num_tiles = per_strip * (split + 1) / a.splits - first;
  uint16_t* const dense = reinterpret_cast<uint16_t*>(shared_memory());
  int32_t* const starts = reinterpret_cast<int32_t*>(shared_memory() + DENSE_BYTES);
  unsigned char* const stages = shared_memory() + DENSE_BYTES + bytes_of_starts((per_strip + a.splits - 1) / a.splits);
  const int stage_bytes = bytes_of_stage(2 * a.max_values, NB);
  const int64_t tile_0 = static_cast<int64_t>(strip) * per_strip + first;
  for (int i = thread; i <= num_tiles; i += THREADS) starts[i] = a.starts[tile_0 + i];
  __syncthreads();

  auto fetch = [&](int tile) {
    if (tile < num_tiles) {
      unsigned char* const stage = stages + tile % STAGES * stage_bytes;
      const unsigned char* const words = reinterpret_cast<const unsigned char*>(a.values) + static_cast<int64_t>(starts[tile]) * 16;
      const int pieces = starts[tile + 1] - starts[tile];
      for (int i = thread; i < pieces; i += THREADS) copy_16(stage + HEADER_BYTES + i * 16, words + i * 16);
      fetch_x<NB>(a, stage + HEADER_BYTES + a.max_values * 4, static_cast<int64_t>(first + tile) * TILE);
    }
    commit();
  };

  float sums[NB][4] = {};
#pragma unroll
  for (int tile = 0; tile < STAGES - 1; ++tile) fetch(tile);
  for (int tile = 0; tile < num_tiles; ++tile) {
    wait<STAGES - 2>();
    __syncthreads();
    fetch(tile + STAGES - 1);
    const unsigned char* const stage = stages + tile % STAGES * stage_bytes;
    const uint32_t* const words = reinterpret_cast<const uint32_t*>(stage + HEADER_BYTES);
    for (int i = thread; i < DENSE_BYTES / 16; i += THREADS) reinterpret_cast<Masks*>(dense)[i] = Masks{};
    __syncthreads();
    const int num_words = 4 * (starts[tile + 1] - starts[tile]);
    for (int i = thread; i < num_words; i += THREADS) dense[words[i] >> 16] = static_cast<uint16_t>(words[i]);  // filled up with the last word
    __syncthreads();
    const Pair* const input = reinterpret_cast<const Pair*>(stage + HEADER_BYTES + a.max_values * 4);
#pragma unroll
    for (int step = 0; step < STEPS; ++step) {
      const Masks weight = reinterpret_cast<const Masks*>(dense)[(warp * STEPS + step) * 32 + lane];
#pragma unroll
      for (int n = 0; n < NB; ++n) mma<TYPE>(sums[n], weight.of, input[(step * NB + n) * 32 + lane].of);
    }
  }
  finish<TYPE, NB>(a, sums, reinterpret_cast<uint32_t*>(starts));
}

int bytes_of_indexed(const TileArguments& a) {
  const int per_strip = static_cast<int>((a.cols + TILE - 1) / TILE);
  return DENSE_BYTES + bytes_of_starts((per_strip + a.splits - 1) / a.splits) + STAGES * bytes_of_stage(2 * a.max_values, blocks_of_x(a.num));
}

// Null for what is not measured.
Kernel indexed_kernel_of(const TileArguments& a) {
  const int blocks = blocks_of_x(a.num);
  if (kernel_of(a) == nullptr || a.type != BFLOAT16) return nullptr;
  return blocks == 1   ? indexed_tiles<BFLOAT16, 1>
         : blocks == 2 ? indexed_tiles<BFLOAT16, 2>
         : blocks == 4 ? indexed_tiles<BFLOAT16, 4>
                       : indexed_tiles<BFLOAT16, 8>;
}

}  // namespace
}  // namespace sparse

#ifndef SPARSE_EMULATED
extern "C" int indexed_tiles_cuda(const sparse::TileArguments* arguments, void* stream) {
  using namespace sparse;
  const TileArguments& a = *arguments;
  const Kernel kernel = indexed_kernel_of(a);
  if (kernel == nullptr) return cudaErrorInvalidValue;
  const int bytes = bytes_of_indexed(a);
  if (bytes > 48 * 1024) {
    const cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
    if (error != cudaSuccess) return error;
  }
  const dim3 grid(static_cast<unsigned>((a.rows + TILE - 1) / TILE), static_cast<unsigned>(a.splits));
  kernel<<<grid, THREADS, bytes, static_cast<cudaStream_t>(stream)>>>(a);
  return cudaGetLastError();
}
#endif
