// The product on a GPU: the weight is loaded sparse and multiplied dense. Values and masks of a tile go to shared memory by asynchronous copies
// while the tile before is expanded into the fragments of mma.m16n8k16; a block walks a strip of 64 rows over its share of the columns.
//
// The loading of sparse weights for dense tensor cores is Flash-LLM's idea (arXiv 2309.10285), masks instead of indices SpInfer's (EuroSys 2025).
// nvcc -gencode … -O3 -std=c++17 -shared -Xcompiler -fPIC. Tests build the same kernel for a CPU (tests/sparse_matmul_emulated.cpp): they
// define SPARSE_EMULATED and play the part of CUDA.
//
// A tile has 64 x 64 weights: 4 warps of 16 rows, 4 steps of 16 columns. Of the 16 x 16 weights of a warp's step a lane needs 8, two in each of
// the four registers of the fragment A. Lanes 0-15 ("half" 0) need the weights of rows 0-3 and 8-11, lanes 16-31 those of rows 4-7 and 12-15.
// For each warp, step and half the tile's header holds four masks, one a register, of which bits 2 l and 2 l + 1 are lane l's; values stand in
// the order of the bits. So a lane finds its values by one popcount for each pair; where the values of a mask begin is stored, since popcounts
// are slow (16 a clock on a multiprocessor): a word of 12 bits for the first mask's, then 6, 7 and 7 bits for what the others are further on.
#include "matmul.h"

#ifndef SPARSE_EMULATED
#include <cuda_runtime.h>
#endif

namespace sparse {

constexpr int TILE = 64, WARPS = 4, STEPS = 4, THREADS = 32 * WARPS;
constexpr int MASK_WORDS = WARPS * STEPS * 2 * 4, HEADER_WORDS = MASK_WORDS + WARPS * STEPS * 2;
constexpr int HEADER_BYTES = HEADER_WORDS * 4;
constexpr int VALUES_AT_ONCE = 8;  // a copy of 16 bytes: tiles begin at multiples of it
constexpr int STAGES = 4;

struct TileArguments {
  const uint32_t* header;    // [tiles, HEADER_WORDS], tiles of a strip of rows one after the other
  const uint16_t* values;    // bf16 or fp16
  const int32_t* starts;     // [tiles + 1], in units of VALUES_AT_ONCE values
  const uint16_t* x;         // [num, cols]
  const uint16_t* bias;      // [rows] or null
  uint16_t* y;               // [num, rows]
  float* partial;            // [splits, strips, 8 · blocks of x · THREADS / 2], where there are splits
  uint32_t* arrived;         // [strips], 0 before and after, where there are splits
  int64_t rows, cols, num, x_stride;
  int32_t max_values;        // of a tile, a multiple of VALUES_AT_ONCE
  int32_t splits;            // blocks that share a strip
  int32_t type;
};

namespace {

#ifndef SPARSE_EMULATED
__device__ __forceinline__ unsigned char* shared_memory() {
  extern __shared__ __align__(16) unsigned char memory[];
  return memory;
}
__device__ __forceinline__ uint32_t shared_address(const void* at) { return static_cast<uint32_t>(__cvta_generic_to_shared(at)); }
__device__ __forceinline__ void copy_16(void* to, const void* from) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(shared_address(to)), "l"(from) : "memory");
}
// Four bytes, or zeros.
__device__ __forceinline__ void copy_4(void* to, const void* from, bool there) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;" ::"r"(shared_address(to)), "l"(from), "r"(there ? 4 : 0) : "memory");
}
__device__ __forceinline__ void commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int LEFT>
__device__ __forceinline__ void wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(LEFT) : "memory");
}
template <int TYPE>
__device__ __forceinline__ void mma(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  if constexpr (TYPE == BFLOAT16) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
  } else {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
  }
}
template <int TYPE>
__device__ __forceinline__ uint16_t from_float(float x) {
  uint16_t bits;
  if constexpr (TYPE == BFLOAT16) {
    asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(bits) : "f"(x));
  } else {
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(bits) : "f"(x));
  }
  return bits;
}
template <int TYPE>
__device__ __forceinline__ float to_float(uint16_t bits) {
  float x;
  if constexpr (TYPE == BFLOAT16) {
    x = __uint_as_float(static_cast<uint32_t>(bits) << 16);
  } else {
    asm("cvt.f32.f16 %0, %1;" : "=f"(x) : "h"(bits));
  }
  return x;
}
#endif

struct alignas(16) Masks {
  uint32_t of[4];
};
struct alignas(8) Pair {
  uint32_t of[2];
};

// The fragment A of a warp's step: from four masks and the word that says where their values begin.
__device__ __forceinline__ void expand(const Masks& masks, uint32_t begins, const uint16_t* values, int lane, uint32_t (&a)[4]) {
  const int place = 2 * (lane & 15);
  const uint32_t below = (1u << place) - 1;
  const uint32_t further[4] = {0, begins >> 12 & 63, begins >> 18 & 127, begins >> 25};
#pragma unroll
  for (int j = 0; j < 4; ++j) {
    const uint16_t* const mine = values + ((begins & 4095) + further[j] + __popc(masks.of[j] & below));
    const uint32_t kept = masks.of[j] >> place;
    const uint32_t low = kept & 1 ? mine[0] : 0, high = kept & 2 ? mine[kept & 1] : 0;
    a[j] = low | high << 16;
  }
}

// Shared memory: the starts of the block's tiles, then stages of header, values and x.
__device__ __host__ __forceinline__ int bytes_of_stage(int max_values, int blocks_of_x) {
  return HEADER_BYTES + max_values * 2 + blocks_of_x * STEPS * 32 * 8;
}
__device__ __host__ __forceinline__ int bytes_of_starts(int tiles) { return ((tiles + 1) * 4 + 15) & ~15; }

// 64 columns of x, from ``column_0`` on, to where the lanes of fragment B take them: [step, block of x, lane, register], two columns a register.
template <int NB>
__device__ __forceinline__ void fetch_x(const TileArguments& a, unsigned char* input, int64_t column_0) {
#pragma unroll
  for (int i = threadIdx.x; i < NB * 8 * (TILE / 2); i += THREADS) {
    const int pair = i % (TILE / 2), row = i / (TILE / 2);
    const int to = ((pair / 8 * NB + row / 8) * 32 + row % 8 * 4 + pair % 4) * 2 + pair / 4 % 2;
    const int64_t column = column_0 + 2 * pair;
    const bool there = row < a.num && column < a.cols;
    copy_4(input + to * 4, there ? a.x + row * a.x_stride + column : a.x, there);
  }
}

// What every thread of a block has summed, to y: at once, or by the last block of those that share a strip. ``order`` is a word that all share.
template <int TYPE, int NB>
__device__ __forceinline__ void finish(const TileArguments& a, float (&sums)[NB][4], uint32_t* order) {
  const int thread = threadIdx.x, lane = thread % 32, warp = thread / 32, strip = blockIdx.x, split = blockIdx.y;
  if (a.splits > 1) {  // the last block adds what all have left, always in the same order
    const int64_t apart = static_cast<int64_t>(gridDim.x) * NB * 4 * THREADS;
    float* const mine = a.partial + static_cast<int64_t>(strip) * NB * 4 * THREADS + thread;
#pragma unroll
    for (int i = 0; i < NB * 4; ++i) mine[split * apart + i * THREADS] = sums[i / 4][i % 4];
    __threadfence();
    __syncthreads();  // also: nobody reads the word's place any more
    if (thread == 0) *order = atomicAdd(a.arrived + strip, 1u);
    __syncthreads();
    if (*order != static_cast<uint32_t>(a.splits - 1)) return;
    __threadfence();
    if (thread == 0) a.arrived[strip] = 0;
#pragma unroll
    for (int i = 0; i < NB * 4; ++i) {
      float sum = 0.0f;
      for (int s = 0; s < a.splits; ++s) sum += __ldcg(mine + s * apart + i * THREADS);
      sums[i / 4][i % 4] = sum;
    }
  }
#pragma unroll
  for (int i = 0; i < NB * 4; ++i) {
    const int64_t row = static_cast<int64_t>(strip) * TILE + warp * 16 + lane / 4 + i % 4 / 2 * 8, n = i / 4 * 8 + lane % 4 * 2 + i % 2;
    if (row >= a.rows || n >= a.num) continue;
    const float bias = a.bias == nullptr ? 0.0f : to_float<TYPE>(a.bias[row]);
    a.y[n * a.rows + row] = from_float<TYPE>(sums[i / 4][i % 4] + bias);
  }
}

// NB blocks of 8 rows of x; block (strip, split).
template <int TYPE, int NB>
__global__ void __launch_bounds__(THREADS) tiles_of(const TileArguments a) {
  const int thread = threadIdx.x, lane = thread % 32, warp = thread / 32;
  const int per_strip = static_cast<int>((a.cols + TILE - 1) / TILE), strip = blockIdx.x, split = blockIdx.y;
  const int first = per_strip * split / a.splits, num_tiles = per_strip * (split + 1) / a.splits - first;
  int32_t* const starts = reinterpret_cast<int32_t*>(shared_memory());
  unsigned char* const stages = shared_memory() + bytes_of_starts((per_strip + a.splits - 1) / a.splits);
  const int stage_bytes = bytes_of_stage(a.max_values, NB);
  const int64_t tile_0 = static_cast<int64_t>(strip) * per_strip + first;
  for (int i = thread; i <= num_tiles; i += THREADS) starts[i] = a.starts[tile_0 + i];
  __syncthreads();

  auto fetch = [&](int tile) {
    if (tile < num_tiles) {
      unsigned char* const stage = stages + tile % STAGES * stage_bytes;
      const unsigned char* const header = reinterpret_cast<const unsigned char*>(a.header + (tile_0 + tile) * HEADER_WORDS);
      if (thread < HEADER_BYTES / 16) copy_16(stage + thread * 16, header + thread * 16);
      const unsigned char* const values = reinterpret_cast<const unsigned char*>(a.values) + static_cast<int64_t>(starts[tile]) * 16;
      const int pieces = starts[tile + 1] - starts[tile];
      for (int i = thread; i < pieces; i += THREADS) copy_16(stage + HEADER_BYTES + i * 16, values + i * 16);
      fetch_x<NB>(a, stage + HEADER_BYTES + a.max_values * 2, static_cast<int64_t>(first + tile) * TILE);
    }
    commit();
  };

  float sums[NB][4] = {};
#pragma unroll
  for (int tile = 0; tile < STAGES - 1; ++tile) fetch(tile);
  for (int tile = 0; tile < num_tiles; ++tile) {
    wait<STAGES - 2>();
    __syncthreads();  // the tile is there for all, and all have left the one whose place is filled next
    fetch(tile + STAGES - 1);
    const unsigned char* const stage = stages + tile % STAGES * stage_bytes;
    const Masks* const masks = reinterpret_cast<const Masks*>(stage);
    const uint32_t* const begins = reinterpret_cast<const uint32_t*>(stage) + MASK_WORDS;
    const uint16_t* const values = reinterpret_cast<const uint16_t*>(stage + HEADER_BYTES);
    const Pair* const input = reinterpret_cast<const Pair*>(stage + HEADER_BYTES + a.max_values * 2);
#pragma unroll
    for (int step = 0; step < STEPS; ++step) {
      const int which = (warp * STEPS + step) * 2 + lane / 16;
      uint32_t weight[4];
      expand(masks[which], begins[which], values, lane, weight);
#pragma unroll
      for (int n = 0; n < NB; ++n) {
        const Pair b = input[(step * NB + n) * 32 + lane];
        mma<TYPE>(sums[n], weight, b.of);
      }
    }
  }

  finish<TYPE, NB>(a, sums, reinterpret_cast<uint32_t*>(starts));
}

using Kernel = void (*)(TileArguments);

// Blocks of 8 rows of x that a kernel takes: 1, 2, 4 or 8; 0 for more than 64 rows.
int blocks_of_x(int64_t num) { return num <= 8 ? 1 : num <= 16 ? 2 : num <= 32 ? 4 : num <= 64 ? 8 : 0; }

template <int TYPE>
Kernel kernel_of(int blocks) {
  return blocks == 1   ? tiles_of<TYPE, 1>
         : blocks == 2 ? tiles_of<TYPE, 2>
         : blocks == 4 ? tiles_of<TYPE, 4>
         : blocks == 8 ? tiles_of<TYPE, 8>
                       : nullptr;
}

// Null for a type, a number of rows or an alignment of x that it does not know.
Kernel kernel_of(const TileArguments& a) {
  const bool even = a.cols % 2 == 0 && a.x_stride % 2 == 0 && reinterpret_cast<uintptr_t>(a.x) % 4 == 0;
  if (!even || a.num < 1 || a.max_values % VALUES_AT_ONCE != 0) return nullptr;
  return a.type == BFLOAT16 ? kernel_of<BFLOAT16>(blocks_of_x(a.num)) : a.type == FLOAT16 ? kernel_of<FLOAT16>(blocks_of_x(a.num)) : nullptr;
}

int bytes_of_block(const TileArguments& a) {
  const int per_strip = static_cast<int>((a.cols + TILE - 1) / TILE);
  return bytes_of_starts((per_strip + a.splits - 1) / a.splits) + STAGES * bytes_of_stage(a.max_values, blocks_of_x(a.num));
}

}  // namespace
}  // namespace sparse

// Blocks that share a strip of 64 rows so that about four blocks run on each multiprocessor, each with four tiles or more.
extern "C" int sparse_tiles_splits(int64_t rows, int64_t cols, int multiprocessors) {
  const int64_t strips = (rows + sparse::TILE - 1) / sparse::TILE, per_strip = (cols + sparse::TILE - 1) / sparse::TILE;
  const int64_t wanted = (4 * int64_t(multiprocessors) + strips - 1) / strips, most = per_strip / 4 > 0 ? per_strip / 4 : 1;
  return static_cast<int>(wanted < most ? wanted : most);
}

// Floats of ``partial`` that a call needs.
extern "C" int64_t sparse_tiles_partial(const sparse::TileArguments* a) {
  const int64_t strips = (a->rows + sparse::TILE - 1) / sparse::TILE;
  return a->splits > 1 ? a->splits * strips * sparse::blocks_of_x(a->num) * 4 * sparse::THREADS : 0;
}

extern "C" int64_t sparse_tiles_arguments_size() { return sizeof(sparse::TileArguments); }

#ifndef SPARSE_EMULATED
extern "C" const char* sparse_tiles_error(int code) { return cudaGetErrorString(static_cast<cudaError_t>(code)); }

// Queues the product of up to 64 rows of x; 0 or a CUDA error.
extern "C" int sparse_tiles_cuda(const sparse::TileArguments* arguments, void* stream) {
  using namespace sparse;
  const TileArguments& a = *arguments;
  const Kernel kernel = kernel_of(a);
  if (kernel == nullptr) return cudaErrorInvalidValue;
  const int bytes = bytes_of_block(a);
  if (bytes > 48 * 1024) {
    const cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
    if (error != cudaSuccess) return error;
  }
  const dim3 grid(static_cast<unsigned>((a.rows + TILE - 1) / TILE), static_cast<unsigned>(a.splits));
  kernel<<<grid, THREADS, bytes, static_cast<cudaStream_t>(stream)>>>(a);
  return cudaGetLastError();
}
#endif
