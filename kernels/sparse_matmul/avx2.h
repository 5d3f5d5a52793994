// Eight weights at a time: a byte of the bitmap chooses one of 256 shuffles that put its values where they belong and 0 elsewhere.
// Compiled under target("avx2,fma,f16c,popcnt").

struct Vectors {
  static constexpr int STEP = 8, REGISTERS = 16;
  using Floats = __m256;
  template <class T>
  struct Numbers {
    using X = float;
    using Piece = __m256;
    static constexpr int PARTS = 1;
  };
  struct Expanded {
    __m256 part[1];
  };

  static __m256 zero() { return _mm256_setzero_ps(); }
  static __m256 load(const float* from) { return _mm256_loadu_ps(from); }
  static void store(float* to, __m256 x) { _mm256_storeu_ps(to, x); }
  static __m256 fma(__m256 a, __m256 b, __m256 c) { return _mm256_fmadd_ps(a, b, c); }
  static float sum(__m256 x) {
    const __m128 four = _mm_add_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
    const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
  }
  static void hold(__m256& x) { asm("" : "+x"(x)); }  // in a register, not loaded again by every product
  static uint32_t bits(const uint8_t* from) { return *from; }
  static int count(uint32_t bits) { return __builtin_popcount(bits); }
  // Where column c of a step stands among the floats that an expansion of T yields.
  template <class T>
  static int place(int c) {
    return c;
  }

  static Expanded expand(const bfloat16* values, uint32_t bits) {
    const __m256i both = _mm256_broadcastsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i*>(values)));
    return {_mm256_castsi256_ps(_mm256_shuffle_epi8(both, *reinterpret_cast<const __m256i*>(TABLES.wide[bits])))};
  }
  static Expanded expand(const float16* values, uint32_t bits) {
    const __m128i eight = _mm_loadu_si128(reinterpret_cast<const __m128i*>(values));
    return {_mm256_cvtph_ps(_mm_shuffle_epi8(eight, *reinterpret_cast<const __m128i*>(TABLES.narrow[bits])))};
  }
  static Expanded expand(const float* values, uint32_t bits) {
    const __m256i from = *reinterpret_cast<const __m256i*>(TABLES.lanes[bits]);  // its sign says that the weight is 0
    return {_mm256_blendv_ps(_mm256_permutevar8x32_ps(_mm256_loadu_ps(values), from), _mm256_setzero_ps(), _mm256_castsi256_ps(from))};
  }

  struct Tables {
    alignas(32) uint8_t wide[256][32];    // bf16 into the upper halves of floats
    alignas(32) uint8_t narrow[256][16];  // 16 bits to 16 bits
    alignas(32) uint32_t lanes[256][8];   // floats
    constexpr Tables() : wide(), narrow(), lanes() {
      for (int bits = 0; bits < 256; ++bits) {
        int next = 0;
        for (int c = 0; c < 8; ++c) {
          const bool kept = bits >> c & 1;
          const uint8_t low = kept ? 2 * next : 0x80, high = kept ? 2 * next + 1 : 0x80;
          wide[bits][4 * c] = wide[bits][4 * c + 1] = 0x80;
          wide[bits][4 * c + 2] = narrow[bits][2 * c] = low;
          wide[bits][4 * c + 3] = narrow[bits][2 * c + 1] = high;
          lanes[bits][c] = kept ? next : 0x80000000u;
          next += kept;
        }
      }
    }
  };
  static const Tables TABLES;
};
constexpr Vectors::Tables Vectors::TABLES{};
