// Rows on a GPU: a block a row, or on sm_90 a cluster of blocks that keeps the row in its shared memory between the sweeps.
//
// nvcc -gencode … -O3 -std=c++17 -shared -Xcompiler -fPIC. Tests build the same kernels for a CPU (tests/kd_loss_emulated.cpp): they define
// KD_EMULATED and play the part of CUDA.
#include "rows.h"

#ifndef KD_EMULATED
#include <cooperative_groups.h>
#include <cuda_runtime.h>
#endif

namespace kd {
namespace {

constexpr int THREADS = 512;
constexpr int WIDTH = 8;         // elements a thread takes at once: two accesses of 16 bytes in float32, one in bf16
constexpr int RESERVED = 2048;   // bytes of shared memory before the row: what warps and blocks tell each other
constexpr int EXCHANGE = 64;     // of which at their end: what a block tells the others
constexpr int MAX_CLUSTER = 8;   // the largest that every sm_90 grants
constexpr int STREAMING = 1, ON_CHIP = 2;  // variants; 0 is the one that fits

#ifndef KD_EMULATED
__device__ __forceinline__ unsigned char* shared_memory() {
  extern __shared__ __align__(16) unsigned char memory[];
  return memory;
}
template <class T>
__device__ __forceinline__ T shuffled(T x, int mask) {
  static_assert(sizeof(T) % 4 == 0, "words");
  int words[sizeof(T) / 4];
  memcpy(words, &x, sizeof(T));
#pragma unroll
  for (unsigned k = 0; k < sizeof(T) / 4; ++k) words[k] = __shfl_xor_sync(0xffffffffu, words[k], mask);
  memcpy(&x, words, sizeof(T));
  return x;
}
__device__ __forceinline__ unsigned cluster_size() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  return cooperative_groups::this_cluster().num_blocks();
#else
  return 1;
#endif
}
__device__ __forceinline__ unsigned cluster_rank() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  return cooperative_groups::this_cluster().block_rank();
#else
  return 0;
#endif
}
__device__ __forceinline__ void cluster_sync() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  cooperative_groups::this_cluster().sync();
#endif
}
template <class T>
__device__ __forceinline__ T* in_block(T* mine, unsigned rank) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  return cooperative_groups::this_cluster().map_shared_rank(mine, rank);
#else
  return mine;
#endif
}
#endif

struct alignas(16) Word {
  uint32_t part[4];
};

// ---- eight elements, in float32 or bf16: the type is the same for all threads, and a branch costs less than three times the kernels ------

struct Numbers {
  unsigned char* at;
  bool half;     // bf16
  bool aligned;  // to 16 bytes
  __device__ __forceinline__ int bytes() const { return half ? 2 : 4; }
  __device__ __forceinline__ float one(int64_t i) const {
    return half ? widened(reinterpret_cast<const bfloat16*>(at)[i]) : reinterpret_cast<const float*>(at)[i];
  }
  __device__ __forceinline__ void put(int64_t i, float x) const {
    if (half) {
      reinterpret_cast<bfloat16*>(at)[i] = rounded(x);
    } else {
      reinterpret_cast<float*>(at)[i] = x;
    }
  }
  // Those from i on, ``count`` of them; what is beyond is not read, and very negative.
  __device__ __forceinline__ void read(int64_t i, int count, float (&to)[WIDTH]) const {
    if (!aligned || count != WIDTH) {
#pragma unroll
      for (int k = 0; k < WIDTH; ++k) to[k] = k < count ? one(i + k) : -FLT_MAX;
    } else if (half) {
      const Word word = *reinterpret_cast<const Word*>(at + i * 2);
#pragma unroll
      for (int k = 0; k < 4; ++k) {
        to[2 * k] = of_bits(static_cast<int32_t>(word.part[k] << 16));
        to[2 * k + 1] = of_bits(static_cast<int32_t>(word.part[k] & 0xffff0000u));
      }
    } else {
      const Word low = *reinterpret_cast<const Word*>(at + i * 4), high = *reinterpret_cast<const Word*>(at + i * 4 + 16);
#pragma unroll
      for (int k = 0; k < 4; ++k) {
        to[k] = of_bits(static_cast<int32_t>(low.part[k]));
        to[k + 4] = of_bits(static_cast<int32_t>(high.part[k]));
      }
    }
  }
  __device__ __forceinline__ void write(int64_t i, int count, const float (&from)[WIDTH]) const {
    if (!aligned || count != WIDTH) {
#pragma unroll
      for (int k = 0; k < WIDTH; ++k)
        if (k < count) put(i + k, from[k]);
    } else if (half) {
      Word word;
#pragma unroll
      for (int k = 0; k < 4; ++k) word.part[k] = rounded(from[2 * k]).bits | static_cast<uint32_t>(rounded(from[2 * k + 1]).bits) << 16;
      *reinterpret_cast<Word*>(at + i * 2) = word;
    } else {
      Word low, high;
#pragma unroll
      for (int k = 0; k < 4; ++k) {
        low.part[k] = static_cast<uint32_t>(bits_of(from[k]));
        high.part[k] = static_cast<uint32_t>(bits_of(from[k + 4]));
      }
      *reinterpret_cast<Word*>(at + i * 4) = low;
      *reinterpret_cast<Word*>(at + i * 4 + 16) = high;
    }
  }
};

__device__ __forceinline__ void apply(const Head& head, int64_t i, int count, float (&z)[WIDTH]) {
  if (head.bias == nullptr && head.scale == 1.0f && head.cap == 0.0f) return;
#pragma unroll
  for (int k = 0; k < WIDTH; ++k)
    if (k < count) z[k] = logit_of<float>(z[k], head.bias == nullptr ? 0.0f : head.bias[i + k], head);
}

// ---- a team: the threads of a row ----------------------------------------------------------------------------------------------------

struct BothMoments {
  Moments<float> student, teacher;
};

// ``mine`` of all threads of the row, merged; every thread receives it.
template <class T, class Merge>
__device__ __forceinline__ T over_team(T mine, unsigned blocks, Merge merge) {
  static_assert(sizeof(T) <= EXCHANGE && sizeof(T) * (THREADS / 32) <= RESERVED - EXCHANGE, "room for every warp");
  T* const slots = reinterpret_cast<T*>(shared_memory());  // read by one warp alone, before a barrier: free when the next reduction comes
  T* const exchange = reinterpret_cast<T*>(shared_memory() + RESERVED - EXCHANGE);
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, warps = blockDim.x / 32;
#pragma unroll
  for (int mask = 16; mask > 0; mask /= 2) mine = merge(mine, shuffled(mine, mask));
  if (lane == 0) slots[warp] = mine;
  __syncthreads();
  if (warp == 0) {
    mine = lane < warps ? slots[lane] : T{};
#pragma unroll
    for (int mask = 16; mask > 0; mask /= 2) mine = merge(mine, shuffled(mine, mask));
    if (lane == 0) *exchange = mine;
  }
  if (blocks == 1) {
    __syncthreads();
    return *exchange;
  }
  cluster_sync();
  T total = *in_block(exchange, 0);
  for (unsigned rank = 1; rank < blocks; ++rank) total = merge(total, *in_block(exchange, rank));
  cluster_sync();  // nobody leaves, or writes anew, while others read
  return total;
}

// ---- a row -----------------------------------------------------------------------------------------------------------------------------

__device__ __forceinline__ bool on_16_bytes(const void* pointer) { return reinterpret_cast<uintptr_t>(pointer) % 16 == 0; }

__device__ __forceinline__ Numbers row_at(const void* base, int64_t elements, bool half) {
  unsigned char* const at = static_cast<unsigned char*>(const_cast<void*>(base)) + elements * (half ? 2 : 4);
  return {at, half, on_16_bytes(at)};
}

template <int MODE, bool CHIP>
__global__ void __launch_bounds__(THREADS, CHIP || MODE == GENERAL ? 1 : 2) rows(const Arguments a) {
  const unsigned blocks = CHIP ? cluster_size() : 1, rank = CHIP ? cluster_rank() : 0;
  const int64_t row = blockIdx.x / blocks, label = a.labels[row];
  const int64_t share = (a.vocab + int64_t(blocks) * WIDTH - 1) / (int64_t(blocks) * WIDTH) * WIDTH;
  const int64_t first = share * rank, last = first + share < a.vocab ? first + share : a.vocab;
  const int64_t stride = int64_t(blockDim.x) * WIDTH, begin = first + threadIdx.x * WIDTH;
  const bool half = a.input_type == BFLOAT16;
  const Numbers products = row_at(a.student, row * a.student_stride, half);
  const Numbers theirs = MODE == LABELS ? products : row_at(a.teacher, row * a.teacher_stride, half);
  const Numbers gradient{products.at, a.output_type == BFLOAT16, products.aligned};
  const bool lead = rank == 0 && threadIdx.x == 0, wanted = a.scales != nullptr;
  if (label == IGNORE_INDEX) {
    const float zeros[WIDTH] = {};
    for (int64_t i = begin; wanted && i < last; i += stride) gradient.write(i, last - i < WIDTH ? last - i : WIDTH, zeros);
    for (int term = 0; lead && term < NUM_TERMS; ++term) a.values[term * a.num_rows + row] = 0.0f;
    return;
  }
  const bool hard = a.terms & 1 << CROSS_ENTROPY, token = label >= 0 && label < a.vocab;
  float student_there = 0.0f;  // read before any thread writes: the reduction stands between
  if (lead && hard && token) {
    const float bias = a.student_head.bias == nullptr ? 0.0f : a.student_head.bias[label];
    student_there = logit_of<float>(products.one(label), bias, a.student_head);
  }

  // first sweep
  const float per_temperature = 1.0f / a.temperature;
  const Numbers chip{shared_memory() + RESERVED, half, true};
  const Numbers chip_theirs{chip.at + share * chip.bytes(), half, true};
  BothMoments mine;
  for (int64_t i = begin; i < last; i += stride) {
    const int count = last - i < WIDTH ? last - i : WIDTH;
    float z[WIDTH], t[WIDTH];
    products.read(i, count, z);
    if (MODE != LABELS) theirs.read(i, count, t);
    if (CHIP) {
      chip.write(i - first, count, z);
      if (MODE != LABELS) chip_theirs.write(i - first, count, t);
    }
    apply(a.student_head, i, count, z);
    add(mine.student, z, per_temperature, hard && a.temperature != 1.0f);
    if (MODE != LABELS) {
      apply(a.teacher_head, i, count, t);
      add(mine.teacher, t, per_temperature, false);
    }
  }
  mine = over_team(mine, blocks, [=](const BothMoments& x, const BothMoments& y) {
    return BothMoments{merged(x.student, y.student, per_temperature), merged(x.teacher, y.teacher, per_temperature)};
  });
  Row r = row_of(a, row, mine.student, MODE == LABELS ? mine.student : mine.teacher);
  const Numbers& students = CHIP ? chip : products;  // element i stands at i − origin
  const Numbers& teachers = CHIP ? chip_theirs : theirs;
  const int64_t origin = CHIP ? first : 0;
  const auto merge = [](const Sums<float>& x, const Sums<float>& y) { return merged(x, y); };

  // second sweep: values, where the gradient needs them or there is none
  Sums<float> sums;
  if (MODE == GENERAL || (MODE == FORWARD && !wanted)) {
    for (int64_t i = begin; i < last; i += stride) {
      const int count = last - i < WIDTH ? last - i : WIDTH;
      float z[WIDTH], t[WIDTH];
      students.read(i - origin, count, z);
      teachers.read(i - origin, count, t);
      apply(a.student_head, i, count, z);
      apply(a.teacher_head, i, count, t);
#pragma unroll
      for (int k = 0; k < WIDTH; ++k)
        if (k < count) add<MODE, float>(sums, pair_of<MODE, float>(z[k], t[k], r, a.terms), z[k], t[k], r, a.terms);
    }
    sums = over_team(sums, blocks, merge);
    r.reverse_value = at_least_0(sums.reverse);
    r.student_value = at_least_0(sums.student);
  }

  // third sweep: the gradient, over the products. All threads take part in every round: a narrower gradient is written where others read.
  if (wanted) {
    const bool crossing = !CHIP && gradient.half && !products.half;
    const int64_t rounds = (last - first + stride - 1) / stride;
    for (int64_t round = 0; round < rounds; ++round) {
      const int64_t i = begin + round * stride;
      const int count = i >= last ? 0 : (last - i < WIDTH ? last - i : WIDTH);
      float z[WIDTH], t[WIDTH], g[WIDTH];
      if (count > 0) {
        students.read(i - origin, count, z);
        apply(a.student_head, i, count, z);
        if (MODE != LABELS) {
          teachers.read(i - origin, count, t);
          apply(a.teacher_head, i, count, t);
        }
        const int64_t hot = hard ? label - i : -1;
#pragma unroll
        for (int k = 0; k < WIDTH; ++k) {
          const Pair<float> x = pair_of<MODE, float>(z[k], MODE == LABELS ? 0.0f : t[k], r, a.terms);
          if (MODE == FORWARD && k < count) add<MODE, float>(sums, x, z[k], t[k], r, a.terms);
          g[k] = gradient_of<MODE, float>(x, z[k], hot == k ? 1.0f : 0.0f, r, a.student_head, a.terms);
        }
      }
      if (crossing) __syncthreads();
      if (count > 0) gradient.write(i, count, g);
    }
    if (MODE == FORWARD) sums = over_team(sums, blocks, merge);
  }
  if (lead) write_values(a, row, r, sums, token ? student_there : NAN);
}

// ---- launching -------------------------------------------------------------------------------------------------------------------------

using Kernel = void (*)(Arguments);

// Null for types that it does not know.
Kernel kernel_of(const Arguments& a, bool chip) {
  static const Kernel kernels[3][2] = {
      {rows<LABELS, false>, rows<LABELS, true>},
      {rows<FORWARD, false>, rows<FORWARD, true>},
      {rows<GENERAL, false>, rows<GENERAL, true>},
  };
  const int types = a.input_type * 2 + a.output_type;
  return types == 0 || types == 1 || types == 3 ? kernels[mode_of(a)][chip] : nullptr;
}

int64_t bytes_on_chip(const Arguments& a, int blocks) {
  const int64_t share = (a.vocab + int64_t(blocks) * WIDTH - 1) / (int64_t(blocks) * WIDTH) * WIDTH;
  return RESERVED + share * (a.input_type == FLOAT32 ? 4 : 2) * (mode_of(a) == LABELS ? 1 : 2);
}

// Blocks of a cluster that hold a row on the chip, 0 where none do. Two blocks on a multiprocessor hide each other's waiting, so the smallest
// cluster that leaves room for two is taken first.
int blocks_on_chip(const Arguments& a, int architecture, int64_t limit) {
  const int most = architecture >= 90 ? MAX_CLUSTER : 1;
  for (int blocks = 1; blocks <= most; blocks *= 2)
    if (bytes_on_chip(a, blocks) <= limit / 2) return blocks;
  return bytes_on_chip(a, most) <= limit ? most : 0;
}

}  // namespace
}  // namespace kd

// The blocks that a row is kept on, 0: streamed. ``architecture`` is 80, 90…, ``limit`` the shared memory of a block in bytes.
extern "C" int kd_loss_blocks(const kd::Arguments* a, int variant, int architecture, int64_t limit) {
  return variant == kd::STREAMING ? 0 : kd::blocks_on_chip(*a, architecture, limit);
}

extern "C" int64_t kd_loss_arguments_size() { return sizeof(kd::Arguments); }

#ifndef KD_EMULATED
extern "C" const char* kd_loss_error(int code) { return cudaGetErrorString(static_cast<cudaError_t>(code)); }

// Queues the sweep of all rows; 0 or a CUDA error. A variant that cannot be is cudaErrorInvalidConfiguration.
extern "C" int kd_loss_cuda(const kd::Arguments* arguments, int variant, void* stream) {
  using namespace kd;
  const Arguments& a = *arguments;
  if (a.num_rows == 0) return cudaSuccess;
  int device = 0, major = 0, minor = 0, limit = 0;
  cudaError_t error = cudaGetDevice(&device);
  if (error == cudaSuccess) error = cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
  if (error == cudaSuccess) error = cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device);
  if (error == cudaSuccess) error = cudaDeviceGetAttribute(&limit, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  if (error != cudaSuccess) return error;
  const int blocks = kd_loss_blocks(&a, variant, major * 10 + minor, limit);
  const Kernel kernel = kernel_of(a, blocks > 0);
  if (kernel == nullptr) return cudaErrorInvalidValue;
  if (variant == ON_CHIP && blocks == 0) return cudaErrorInvalidConfiguration;
  const size_t bytes = blocks > 0 ? bytes_on_chip(a, blocks) : RESERVED;
  if (bytes > 48 * 1024) error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(bytes));
  if (error != cudaSuccess) return error;
  cudaLaunchAttribute cluster{};
  cluster.id = cudaLaunchAttributeClusterDimension;
  cluster.val.clusterDim = {static_cast<unsigned>(blocks), 1, 1};
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>(a.num_rows * (blocks > 0 ? blocks : 1)));
  config.blockDim = dim3(THREADS);
  config.dynamicSmemBytes = bytes;
  config.stream = static_cast<cudaStream_t>(stream);
  config.attrs = &cluster;
  config.numAttrs = blocks > 1 ? 1 : 0;
  error = cudaLaunchKernelEx(&config, kernel, a);
  return error != cudaSuccess ? error : cudaGetLastError();
}
#endif
