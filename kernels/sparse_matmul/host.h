// The product on a CPU, in four sets of instructions of which the best is taken when it runs.
#pragma once

#include <algorithm>
#include <type_traits>
#include <vector>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "matmul.h"
#include "numbers.h"

namespace sparse {
namespace {

constexpr int64_t ALONE = 1 << 15;  // products under which (8 us of one thread) another, awake, does not pay for being told

namespace scalar {
#include "scalar.h"
#include "rows.h"
}  // namespace scalar

#if defined(__x86_64__)
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c,popcnt")
namespace avx2 {
#include "avx2.h"
#include "rows.h"
}  // namespace avx2
#pragma GCC pop_options
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,avx512vbmi2,fma,f16c,popcnt")
namespace avx512 {
#include "avx512.h"
#include "rows.h"
}  // namespace avx512
#pragma GCC pop_options
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,avx512vbmi2,avx512bf16,fma,f16c,popcnt")
namespace avx512_bf16 {
#include "avx512_bf16.h"
#include "rows.h"
}  // namespace avx512_bf16
#pragma GCC pop_options
#endif

// The dense weight into y, for numbers of as many bytes as T.
template <class T>
void unpack(const Arguments& a) {
  const int64_t row_bytes = (a.cols + 7) / 8;
#pragma omp parallel for schedule(dynamic, 16) num_threads(a.rows * a.cols < ALONE ? 1 : a.num_threads)
  for (int64_t row = 0; row < a.rows; ++row) {
    const uint8_t* const bits = a.bitmap + row * row_bytes;
    const T* next = static_cast<const T*>(a.values) + a.row_starts[row];
    T* const to = static_cast<T*>(a.y) + row * a.cols;
    memset(to, 0, a.cols * sizeof(T));
    for (int64_t i = 0; i < row_bytes; ++i)
      for (uint32_t left = bits[i]; left != 0; left &= left - 1) to[8 * i + __builtin_ctz(left)] = *next++;
  }
}

enum Instructions : int32_t { BEST = 0, SCALAR = 1, AVX2 = 2, AVX512 = 3, AVX512_BF16 = 4 };

int32_t best() {
#if defined(__x86_64__)
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vbmi2"))
    return __builtin_cpu_supports("avx512bf16") ? AVX512_BF16 : AVX512;
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c")) return AVX2;
#endif
  return SCALAR;
}

}  // namespace
}  // namespace sparse

// What BEST is here: 1 scalar, 2 AVX2, 3 AVX-512, 4 with products of bf16.
extern "C" int sparse_matmul_instructions() { return sparse::best(); }

// 0; 1 for a type that it does not know; 2 for instructions that this processor does not have.
extern "C" int sparse_matmul_host(const sparse::Arguments* arguments) {
  using namespace sparse;
  const Arguments& a = *arguments;
  if (a.instructions > best()) return 2;
  const int32_t instructions = a.instructions == BEST ? best() : a.instructions;
#if defined(__x86_64__)
  if (instructions == AVX512_BF16) return avx512_bf16::multiply(a) ? 0 : 1;
  if (instructions == AVX512) return avx512::multiply(a) ? 0 : 1;
  if (instructions == AVX2) return avx2::multiply(a) ? 0 : 1;
#endif
  return scalar::multiply(a) ? 0 : 1;
}

// The whole weight into y, which is [rows, cols]; 0, or 1 for a type that it does not know.
extern "C" int sparse_unpack_host(const sparse::Arguments* a) {
  if (a->type != sparse::FLOAT32 && a->type != sparse::BFLOAT16 && a->type != sparse::FLOAT16) return 1;
  a->type == sparse::FLOAT32 ? sparse::unpack<uint32_t>(*a) : sparse::unpack<uint16_t>(*a);
  return 0;
}

extern "C" int64_t sparse_matmul_arguments_size() { return sizeof(sparse::Arguments); }
