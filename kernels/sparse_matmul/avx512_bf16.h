// As avx512.h, but bf16 stay what they are: thirty-two weights are one vector, and their products are added in pairs.
// Compiled under avx512.h's targets and "avx512bf16", after it.

struct Vectors : avx512::Vectors {
  template <class T, class = void>
  struct Numbers : avx512::Vectors::Numbers<T> {};
  template <class Any>
  struct Numbers<bfloat16, Any> {
    using X = bfloat16;
    using Piece = __m512i;
    static constexpr int PARTS = 1;
  };
  struct Pairs {
    __m512i part[1];
  };

  using avx512::Vectors::expand, avx512::Vectors::fma, avx512::Vectors::hold, avx512::Vectors::load, avx512::Vectors::store;
  static __m512i load(const bfloat16* from) { return _mm512_loadu_si512(from); }
  static void store(bfloat16* to, __m512i x) { _mm512_storeu_si512(to, x); }
  static __m512 fma(__m512i a, __m512i b, __m512 c) { return _mm512_dpbf16_ps(c, (__m512bh)a, (__m512bh)b); }
  static void hold(__m512i& x) { asm("" : "+v"(x)); }
  template <class T>
  static int place(int c) {
    return std::is_same<T, bfloat16>::value ? c : avx512::Vectors::place<T>(c);
  }
  static Pairs expand(const bfloat16* values, uint32_t bits) {
    __m512i from = _mm512_loadu_si512(values);
    hold(from);
    return {_mm512_maskz_expand_epi16(bits, from)};
  }
};
