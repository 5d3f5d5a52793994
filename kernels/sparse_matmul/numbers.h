// Numbers of 16 bits, one at a time.
#pragma once

#include <cstdint>
#include <cstring>

namespace sparse {

struct bfloat16 {
  uint16_t bits;
};
struct float16 {
  uint16_t bits;
};

inline float of_bits(uint32_t bits) {
  float x;
  memcpy(&x, &bits, sizeof(x));
  return x;
}
inline uint32_t bits_of(float x) {
  uint32_t bits;
  memcpy(&bits, &x, sizeof(bits));
  return bits;
}

inline float widened(float x) { return x; }
inline float widened(bfloat16 x) { return of_bits(uint32_t(x.bits) << 16); }
inline float widened(float16 x) {
  const uint32_t sign = uint32_t(x.bits & 0x8000u) << 16, exponent = x.bits >> 10 & 31u, fraction = x.bits & 1023u;
  if (exponent == 31) return of_bits(sign | 0x7f800000u | fraction << 13);
  if (exponent != 0) return of_bits(sign | (exponent + 112) << 23 | fraction << 13);
  return of_bits(sign | bits_of(float(fraction) * 0x1p-24f));  // subnormal, or zero
}

inline void narrow(float x, float* to) { *to = x; }
inline void narrow(float x, bfloat16* to) {
  const uint32_t bits = bits_of(x);
  to->bits = x != x ? 0x7fc0 : uint16_t((bits + 0x7fffu + (bits >> 16 & 1u)) >> 16);
}
inline void narrow(float x, float16* to) {
  const uint32_t bits = bits_of(x), magnitude = bits & 0x7fffffffu, sign = bits >> 16 & 0x8000u;
  uint32_t kept;
  if (magnitude > 0x7f800000u) {
    kept = 0x7e00u;
  } else if (magnitude >= 0x477ff000u) {  // rounds to 65536 or more
    kept = 0x7c00u;
  } else if (magnitude < 0x38800000u) {  // below 2^-14: steps of 2^-24, which are 1 ulp of floats at 0.5
    kept = bits_of(of_bits(magnitude) + 0.5f) - 0x3f000000u;
  } else {
    kept = (magnitude - 0x38000000u + 0xfffu + (magnitude >> 13 & 1u)) >> 13;
  }
  to->bits = uint16_t(sign | kept);
}

}  // namespace sparse
