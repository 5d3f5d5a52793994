// Products of bf16 matrices with float32 results on a CPU, which torch does not have: logits rounded to bf16 would spoil the gradient of a loss.
// g++ -O3 -march=native -fopenmp.
//
// Numbers stand in pairs along the summed dimension, the way vdpbf16ps takes them. A tile of 8 rows and a panel of 48 columns are packed in the
// order in which they are read, and their 24 vectors of sums stay in registers. Every product has one matrix that is small, for it has the rows of a
// chunk: that one is packed once and stays in the second-level cache, the other one is packed piece by piece, each for all it is multiplied with.
// Without the instruction (products_are_native) the same is done with two float32 products a pair, for tests; nobody should wait for it.
#include <algorithm>
#include <cstdint>
#include <cstring>
#include <memory>
#if defined(__AVX512BF16__)
#include <immintrin.h>
#endif

namespace products {

// Which sum: HEAD out[r, c] = Σ_d left[r, d] right[c, d], INPUT Σ_d left[r, d] right[d, c], WEIGHT Σ_d left[d, r] right[d, c].
enum Kind : int32_t { HEAD = 0, INPUT = 1, WEIGHT = 2 };

struct Arguments {
  const uint16_t* left;
  const uint16_t* right;
  float* out;  // [rows, cols]
  int64_t rows, cols, depth;
  int64_t left_stride, right_stride, out_stride;  // in elements, between rows of what stands in memory
  int32_t kind;
  int32_t add;  // to what stands in out
  int32_t num_threads;
};

namespace {

constexpr int LANES = 16, TILE = 8, VECTORS = 3, PANEL = LANES * VECTORS;
constexpr int64_t BLOCK = 512;  // of the head's rows at a time, where the sum runs over them
constexpr int64_t GROUP = 128;  // of rows whose tiles stand beside each other, where they are the head's
constexpr int64_t SPAN = 16;    // of panels that stay in the second-level cache

typedef float floats __attribute__((vector_size(4 * LANES)));
typedef uint32_t pairs __attribute__((vector_size(4 * LANES)));

inline __attribute__((always_inline)) floats plus_dot(floats sum, uint32_t left, pairs right) {
#if defined(__AVX512BF16__)
  return floats(_mm512_dpbf16_ps(__m512(sum), __m512bh(_mm512_set1_epi32(int(left))), __m512bh(right)));
#else
  const pairs both = pairs{} + left;
  return sum + floats(both << 16) * floats(right << 16) + floats(both & 0xffff0000u) * floats(right & 0xffff0000u);
#endif
}

int64_t half(int64_t depth) { return (depth + 1) / 2; }
int64_t parts(int64_t length, int64_t part) { return (length + part - 1) / part; }

struct Free {
  void operator()(uint32_t* p) const { free(p); }
};
using Packed = std::unique_ptr<uint32_t, Free>;
Packed room(int64_t words) { return Packed(static_cast<uint32_t*>(aligned_alloc(64, size_t(parts(words, LANES) * LANES * 4)))); }

// ---- packing: [half(depth), WIDTH] pairs of WIDTH lines, 0 beyond the ``lines`` that are there and beyond the depth ---------------------------------

#if defined(__AVX512BF16__)
// 16 rows of 16 words become their columns.
inline void transpose(const __m512i* in, __m512i* out) {
  __m512i a[16], b[16];
  for (int i = 0; i < 8; ++i) {
    a[2 * i] = _mm512_unpacklo_epi32(in[2 * i], in[2 * i + 1]);
    a[2 * i + 1] = _mm512_unpackhi_epi32(in[2 * i], in[2 * i + 1]);
  }
  for (int i = 0; i < 4; ++i) {
    for (int k = 0; k < 2; ++k) {
      b[4 * i + 2 * k] = _mm512_unpacklo_epi64(a[4 * i + k], a[4 * i + 2 + k]);
      b[4 * i + 2 * k + 1] = _mm512_unpackhi_epi64(a[4 * i + k], a[4 * i + 2 + k]);
    }
  }
  for (int i = 0; i < 4; ++i) {
    for (int k = 0; k < 2; ++k) {
      a[8 * k + i] = _mm512_shuffle_i32x4(b[8 * k + i], b[8 * k + 4 + i], 0x88);
      a[8 * k + 4 + i] = _mm512_shuffle_i32x4(b[8 * k + i], b[8 * k + 4 + i], 0xdd);
    }
  }
  for (int i = 0; i < 8; ++i) {
    out[i] = _mm512_shuffle_i32x4(a[i], a[8 + i], 0x88);
    out[8 + i] = _mm512_shuffle_i32x4(a[i], a[8 + i], 0xdd);
  }
}
#endif

// Lines that run along the depth.
template <int WIDTH>
void pack_along(const uint16_t* from, int64_t stride, int64_t lines, int64_t depth, uint32_t* to) {
  int64_t p = 0;
#if defined(__AVX512BF16__)
  constexpr int BESIDE = WIDTH < LANES ? LANES / WIDTH : 1;  // stretches of the depth that fill a vector
  if (lines >= WIDTH) {
    const int64_t whole = depth / (2 * LANES * BESIDE) * (LANES * BESIDE);
    for (int first = 0; first < WIDTH; first += LANES) {
      for (p = 0; p < whole; p += LANES * BESIDE) {
        __m512i in[LANES], out[LANES];
        for (int i = 0; i < LANES; ++i) in[i] = _mm512_loadu_si512(from + (first + i % WIDTH) * stride + 2 * (p + i / WIDTH * LANES));
        transpose(in, out);
        for (int i = 0; i < LANES; ++i) {
          if constexpr (BESIDE == 1) {
            _mm512_store_si512(to + (p + i) * WIDTH + first, out[i]);
          } else {
            _mm256_store_si256(reinterpret_cast<__m256i*>(to + (p + i) * WIDTH), _mm512_castsi512_si256(out[i]));
            _mm256_store_si256(reinterpret_cast<__m256i*>(to + (p + LANES + i) * WIDTH), _mm512_extracti64x4_epi64(out[i], 1));
          }
        }
      }
    }
  }
#endif
  for (; p < half(depth); ++p) {
    for (int i = 0; i < WIDTH; ++i) {
      const uint16_t* const at = from + i * stride + 2 * p;
      to[p * WIDTH + i] = i >= lines ? 0 : 2 * p + 1 < depth ? at[0] | uint32_t(at[1]) << 16 : at[0];
    }
  }
}

// Lines that run across it: those of a depth stand beside each other. A depth is a row away from the next: later ones are asked for.
template <int WIDTH>
void pack_across(const uint16_t* from, int64_t stride, int64_t lines, int64_t depth, uint32_t* to) {
  for (int64_t p = 0; p < half(depth); ++p, to += WIDTH) {
    const uint16_t *const low = from + 2 * p * stride, *const high = low + stride;
    for (int i = 0; i < WIDTH; i += 32) __builtin_prefetch(low + 16 * stride + i), __builtin_prefetch(high + 16 * stride + i);
    const bool both = 2 * p + 1 < depth;
    if (lines >= WIDTH && both) {
      for (int i = 0; i < WIDTH; ++i) to[i] = low[i] | uint32_t(high[i]) << 16;
    } else {
      for (int i = 0; i < WIDTH; ++i) to[i] = i >= lines ? 0 : both ? low[i] | uint32_t(high[i]) << 16 : low[i];
    }
  }
}

// The same for tiles that stand one after another, as many as are begun: four of them are a line of the cache.
void pack_tiles_across(const uint16_t* from, int64_t stride, int64_t lines, int64_t depth, uint32_t* to) {
  const int64_t count = half(depth);
  int64_t first = 0;
#if defined(__AVX512BF16__)
  constexpr int BESIDE = 4;
  const __m512i lower = _mm512_setr_epi64(0, 1, 8, 9, 2, 3, 10, 11), upper = _mm512_setr_epi64(4, 5, 12, 13, 6, 7, 14, 15);
  for (; first + BESIDE * TILE <= lines; first += BESIDE * TILE) {
    for (int64_t p = 0; p < count; ++p) {
      const uint16_t* const at = from + 2 * p * stride + first;
      const __m512i low = _mm512_loadu_si512(at), high = 2 * p + 1 < depth ? _mm512_loadu_si512(at + stride) : _mm512_setzero_si512();
      const __m512i front = _mm512_unpacklo_epi16(low, high), back = _mm512_unpackhi_epi16(low, high);  // halves of each tile
      const __m512i two[2] = {_mm512_permutex2var_epi64(front, lower, back), _mm512_permutex2var_epi64(front, upper, back)};
      for (int i = 0; i < BESIDE; ++i) {
        __m256i* const out = reinterpret_cast<__m256i*>(to + (first + i * TILE) * count + p * TILE);
        _mm256_store_si256(out, i % 2 ? _mm512_extracti64x4_epi64(two[i / 2], 1) : _mm512_castsi512_si256(two[i / 2]));
      }
    }
  }
#endif
  for (; first < lines; first += TILE) pack_across<TILE>(from + first, stride, lines - first, depth, to + first * count);
}

// ---- a tile times a panel ---------------------------------------------------------------------------------------------------------------------------

// What becomes of a result: it stays in a cache, for more is added to it soon; it is added to what is there; it goes past the caches to memory, which
// saves reading what it replaces.
enum Way { KEEP, ADD, STREAM };

template <Way WAY>
inline __attribute__((always_inline)) void put(float* to, floats x) {
#if defined(__AVX512BF16__)
  if constexpr (WAY == STREAM) return _mm512_stream_ps(to, __m512(x));
#endif
  floats before = {};
  if constexpr (WAY == ADD) memcpy(&before, to, sizeof(before));
  before += x;
  memcpy(to, &before, sizeof(before));
}

template <Way WAY>
void multiply(const uint32_t* tile, const uint32_t* panel, int64_t count, float* out, int64_t stride, int64_t rows, int64_t cols) {
  floats sum[TILE][VECTORS] = {};
  if constexpr (WAY == ADD) {
    for (int i = 0; i < TILE && i < rows; ++i)
      for (int j = 0; j < PANEL && j < cols; j += LANES) __builtin_prefetch(out + i * stride + j, 1);
  }
  for (int64_t p = 0; p < count; ++p) {
    pairs right[VECTORS];
    memcpy(right, __builtin_assume_aligned(panel + p * PANEL, 64), sizeof(right));
#pragma GCC unroll 8
    for (int i = 0; i < TILE; ++i) {
#pragma GCC unroll 3
      for (int j = 0; j < VECTORS; ++j) sum[i][j] = plus_dot(sum[i][j], tile[p * TILE + i], right[j]);
    }
  }
  if (rows >= TILE && cols >= PANEL) {
#pragma GCC unroll 8
    for (int i = 0; i < TILE; ++i) {
#pragma GCC unroll 3
      for (int j = 0; j < VECTORS; ++j) put<WAY>(out + i * stride + j * LANES, sum[i][j]);
    }
    return;
  }
  float all[TILE][PANEL];
  memcpy(all, sum, sizeof(all));
  for (int64_t i = 0; i < std::min<int64_t>(TILE, rows); ++i)
    for (int64_t j = 0; j < std::min<int64_t>(PANEL, cols); ++j) out[i * stride + j] = (WAY == ADD ? out[i * stride + j] : 0.0f) + all[i][j];
}

// Before another thread reads what went past the caches.
void settle() {
#if defined(__AVX512BF16__)
  _mm_sfence();
#endif
}

using Multiply = void (*)(const uint32_t*, const uint32_t*, int64_t, float*, int64_t, int64_t, int64_t);

// For results that nobody reads soon.
Multiply multiply_once(const Arguments& a) {
  const bool whole_lines = reinterpret_cast<uintptr_t>(a.out) % 64 == 0 && a.out_stride % LANES == 0;
  return a.add ? multiply<ADD> : whole_lines ? multiply<STREAM> : multiply<KEEP>;
}

// What is packed next, asked for in parts while something else is multiplied.
struct Coming {
  const uint16_t* from;
  int64_t stride, lines, length;
  void ask(int64_t part, int64_t of) const {
    for (int64_t line = lines * part / of; line < lines * (part + 1) / of; ++line)
      for (int64_t i = 0; i < length; i += 32) __builtin_prefetch(from + line * stride + i, 0, 2);
  }
};

// ---- the three products -----------------------------------------------------------------------------------------------------------------------------

// The head's rows are columns of the result: panel by panel, each for all rows of the chunk.
void head(const Arguments& a) {
  const int64_t count = half(a.depth), tiles = parts(a.rows, TILE), panels = parts(a.cols, PANEL);
  const Multiply multiplied = multiply_once(a);
  const Packed left = room(tiles * TILE * count);
  for (int64_t t = 0; t < tiles; ++t)
    pack_along<TILE>(a.left + t * TILE * a.left_stride, a.left_stride, a.rows - t * TILE, a.depth, left.get() + t * TILE * count);
#pragma omp parallel num_threads(a.num_threads)
  {
    const Packed right = room(PANEL * count);
#pragma omp for schedule(dynamic, 4) nowait
    for (int64_t q = 0; q < panels; ++q) {
      pack_along<PANEL>(a.right + q * PANEL * a.right_stride, a.right_stride, a.cols - q * PANEL, a.depth, right.get());
      const int64_t after = (q + 1) * PANEL;
      const Coming next{a.right + after * a.right_stride, a.right_stride, std::clamp<int64_t>(a.cols - after, 0, PANEL), a.depth};
      for (int64_t t = 0; t < tiles; ++t) {
        next.ask(t, tiles);
        multiplied(left.get() + t * TILE * count, right.get(), count, a.out + t * TILE * a.out_stride + q * PANEL, a.out_stride, a.rows - t * TILE,
                   a.cols - q * PANEL);
      }
    }
    settle();
  }
}

// The head's rows are rows of the result: tile by tile of a group, each for all columns, so that the result is gone through in its order.
void weight(const Arguments& a) {
  const int64_t count = half(a.depth), panels = parts(a.cols, PANEL), groups = parts(a.rows, GROUP);
  const Multiply multiplied = multiply_once(a);
  const Packed right = room(panels * PANEL * count);
  for (int64_t q = 0; q < panels; ++q)
    pack_across<PANEL>(a.right + q * PANEL, a.right_stride, a.cols - q * PANEL, a.depth, right.get() + q * PANEL * count);
#pragma omp parallel num_threads(a.num_threads)
  {
    const Packed left = room(GROUP * count);
#pragma omp for schedule(dynamic, 4) nowait
    for (int64_t g = 0; g < groups; ++g) {
      const int64_t first = g * GROUP, last = std::min(first + GROUP, a.rows);
      pack_tiles_across(a.left + first, a.left_stride, last - first, a.depth, left.get());
      const Coming next{a.left + last, a.left_stride, a.depth, std::min(GROUP, a.rows - last)};
      for (int64_t begin = 0; begin < panels; begin += SPAN) {
        for (int64_t row = first; row < last; row += TILE) {
          next.ask(begin / SPAN * (GROUP / TILE) + (row - first) / TILE, parts(panels, SPAN) * (GROUP / TILE));
          for (int64_t q = begin; q < std::min(begin + SPAN, panels); ++q)
            multiplied(left.get() + (row - first) * count, right.get() + q * PANEL * count, count, a.out + row * a.out_stride + q * PANEL,
                       a.out_stride, a.rows - row, a.cols - q * PANEL);
        }
      }
    }
    settle();
  }
}

// The sum runs over the head's rows: every thread adds up a share of them, and the shares are added in their order.
void input(const Arguments& a) {
  const int64_t tiles = parts(a.rows, TILE), panels = parts(a.cols, PANEL), blocks = parts(a.depth, BLOCK), size = a.rows * a.cols;
  const int64_t shares = std::min<int64_t>(std::max(a.num_threads, 1), blocks);
  const std::unique_ptr<float[]> sums(new float[shares * size]);
#pragma omp parallel for schedule(static, 1) num_threads(int(shares))
  for (int64_t share = 0; share < shares; ++share) {
    const Packed left = room(TILE * tiles * BLOCK / 2), right = room(PANEL * BLOCK / 2);
    float* const out = sums.get() + share * size;
    for (int64_t b = blocks * share / shares, begin = b; b < blocks * (share + 1) / shares; ++b) {
      const int64_t first = b * BLOCK, depth = std::min(BLOCK, a.depth - first), count = half(depth);
      for (int64_t t = 0; t < tiles; ++t)
        pack_along<TILE>(a.left + t * TILE * a.left_stride + first, a.left_stride, a.rows - t * TILE, depth, left.get() + t * TILE * count);
      const int64_t after = first + depth, more = std::min(BLOCK, a.depth - after);
      const Coming gradients{a.left + after, a.left_stride, a.rows, more}, weights{a.right + after * a.right_stride, a.right_stride, more, a.cols};
      const Multiply multiplied = b > begin ? multiply<ADD> : multiply<KEEP>;
      for (int64_t q = 0; q < panels; ++q) {
        gradients.ask(q, panels), weights.ask(q, panels);
        pack_across<PANEL>(a.right + first * a.right_stride + q * PANEL, a.right_stride, a.cols - q * PANEL, depth, right.get());
        for (int64_t t = 0; t < tiles; ++t)
          multiplied(left.get() + t * TILE * count, right.get(), count, out + t * TILE * a.cols + q * PANEL, a.cols,
                     a.rows - t * TILE, a.cols - q * PANEL);
      }
    }
  }
#pragma omp parallel for num_threads(a.num_threads)
  for (int64_t row = 0; row < a.rows; ++row) {
    float* const out = a.out + row * a.out_stride;
    for (int64_t share = 0; share < shares; ++share) {
      const float* const part = sums.get() + share * size + row * a.cols;
      for (int64_t c = 0; c < a.cols; ++c) out[c] = (share || a.add ? out[c] : 0.0f) + part[c];
    }
  }
}

}  // namespace
}  // namespace products

// Whether this processor multiplies pairs of bf16, as it was compiled for.
extern "C" int products_are_native() {
#if defined(__AVX512BF16__)
  return 1;
#else
  return 0;
#endif
}

// 0, or 1 for a kind that it does not know.
extern "C" int products_host(const products::Arguments* arguments) {
  using namespace products;
  const Arguments& a = *arguments;
  if (a.rows <= 0 || a.cols <= 0 || a.depth <= 0) return 1;
  if (a.kind == HEAD) {
    head(a);
  } else if (a.kind == INPUT) {
    input(a);
  } else if (a.kind == WEIGHT) {
    weight(a);
  } else {
    return 1;
  }
  return 0;
}

extern "C" int64_t products_arguments_size() { return sizeof(products::Arguments); }
