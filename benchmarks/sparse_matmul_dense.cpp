// The loop of kernels/sparse_matmul over a dense bf16 weight: the yardstick of its own kind for the benchmark, in the best instructions of the
// machine that it is compiled on (AVX2 at least).
#include <immintrin.h>

#include <algorithm>
#include <type_traits>
#include <vector>

#include "matmul.h"
#include "numbers.h"

namespace sparse {
namespace {
constexpr int64_t ALONE = 1 << 15;
#if defined(__AVX512BF16__) && defined(__AVX512VBMI2__)
namespace avx512 {
#include "avx512.h"
}
namespace bitmap {
#include "avx512_bf16.h"
}
#else
namespace bitmap {
#include "avx2.h"
}
#endif
namespace dense {
struct Vectors : bitmap::Vectors {  // every weight is kept, and no bitmap is read
  static uint32_t bits(const uint8_t*) { return 255; }
  static int count(uint32_t) { return STEP; }
  using bitmap::Vectors::expand;
#if defined(__AVX512BF16__) && defined(__AVX512VBMI2__)
  static Pairs expand(const bfloat16* values, uint32_t) { return {_mm512_loadu_si512(values)}; }
#else
  static Expanded expand(const bfloat16* values, uint32_t) {
    const __m256i wide = _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(values)));
    return {_mm256_castsi256_ps(_mm256_slli_epi32(wide, 16))};
  }
#endif
};
#include "rows.h"
}  // namespace dense
}  // namespace
}  // namespace sparse

extern "C" void dense_linear(const sparse::Arguments* a) { sparse::dense::multiply<sparse::bfloat16>(*a); }
