// Thirty-two weights at a time: four bytes of the bitmap are the mask of an expansion.
// Compiled under target("avx512f,avx512bw,avx512vl,avx512vbmi2,popcnt").

struct Vectors {
  static constexpr int STEP = 32, REGISTERS = 32;
  using Floats = __m512;
  template <class T>
  struct Numbers {
    using X = float;
    using Piece = __m512;
    static constexpr int PARTS = 2;
  };
  struct Expanded {
    __m512 part[2];
  };

  static __m512 zero() { return _mm512_setzero_ps(); }
  static __m512 load(const float* from) { return _mm512_loadu_ps(from); }
  static void store(float* to, __m512 x) { _mm512_storeu_ps(to, x); }
  static __m512 fma(__m512 a, __m512 b, __m512 c) { return _mm512_fmadd_ps(a, b, c); }
  static float sum(__m512 x) { return _mm512_reduce_add_ps(x); }
  static void hold(__m512& x) { asm("" : "+v"(x)); }  // in a register, not loaded again by every product
  static uint32_t bits(const uint8_t* from) {
    uint32_t four;
    memcpy(&four, from, sizeof(four));
    return four;
  }
  static int count(uint32_t bits) { return __builtin_popcount(bits); }
  // Where column c of a step stands among the floats that an expansion of T yields: bf16 are split into even and odd ones.
  template <class T>
  static int place(int c) {
    return std::is_same<T, bfloat16>::value ? c / 2 + c % 2 * 16 : c;
  }

  static Expanded expand(const bfloat16* values, uint32_t bits) {
    const __m512i all = _mm512_maskz_expand_epi16(bits, _mm512_loadu_si512(values));
    return {_mm512_castsi512_ps(_mm512_slli_epi32(all, 16)), _mm512_castsi512_ps(_mm512_and_si512(all, _mm512_set1_epi32(int(0xffff0000u))))};
  }
  static Expanded expand(const float16* values, uint32_t bits) {
    const __m512i all = _mm512_maskz_expand_epi16(bits, _mm512_loadu_si512(values));
    return {_mm512_cvtph_ps(_mm512_castsi512_si256(all)), _mm512_cvtph_ps(_mm512_extracti64x4_epi64(all, 1))};
  }
  static Expanded expand(const float* values, uint32_t bits) {
    const float* const second = values + __builtin_popcount(bits & 0xffffu);
    return {_mm512_maskz_expand_ps(__mmask16(bits), _mm512_loadu_ps(values)), _mm512_maskz_expand_ps(__mmask16(bits >> 16), _mm512_loadu_ps(second))};
  }
};
