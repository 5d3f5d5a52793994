// The arithmetic of a row of logits, once for every machine: nvcc builds it for `float`, a host compiler for vectors of floats too.
//
// P and Q are the softmax of teacher and student logits over the temperature. A row is swept two or three times: statistics (peak and sum of
// exponentials, online), then, for losses whose gradient needs the row's own value, the values, then the gradient. Divergences are summed as
// P log(P/Q) − P + Q and the like: every such term is at least 0, and an error common to all of them (in the logarithm of the sum, which has a
// resolution of 1e-6 at 10) enters in second order only.
#pragma once

#include <cfloat>
#include <cmath>
#include <cstdint>
#include <cstring>
#if defined(__AVX512F__) && !defined(__CUDACC__)
#include <immintrin.h>
#endif

#ifdef __CUDACC__
#define KD_FN __host__ __device__ __forceinline__
#else
#define KD_FN inline __attribute__((always_inline))
#endif

namespace kd {

constexpr int64_t IGNORE_INDEX = -100;

enum Term { FORWARD_KL, REVERSE_KL, JSD, CROSS_ENTROPY, AGREEMENT, NUM_TERMS };
enum Type { FLOAT32, BFLOAT16 };
// What a sweep has to know: the labels alone; P and Q; also the row's own divergences before its gradient.
enum Mode { LABELS, FORWARD, GENERAL };

// What a head does to its product x: scale · (x + bias), then with a cap c: c · tanh(· / c). A cap of 0 is none.
struct Head {
  const float* bias;  // [vocab] or null
  float scale;
  float cap;
};

// What products were made of, in float32: hidden states [num_rows, width] and the head's weight [vocab, width]; hidden is null where nobody says.
struct Factors {
  const float* hidden;
  const float* weight;
  int64_t hidden_stride;
  int64_t weight_stride;
  int64_t width;
};

// One call. Both compilers and ctypes see this layout; everything is of natural alignment.
struct Arguments {
  void* student;         // [num_rows, student_stride]: products of the head; the gradient with respect to them is written in place
  void* teacher;         // [num_rows, teacher_stride], or null where no term needs it; read, and set right where factors are given
  const int64_t* labels; // [num_rows]; rows of IGNORE_INDEX are not read, their gradient is 0
  const float* scales;   // [NUM_TERMS, num_rows]: what each row's term weighs in the gradient; null: values only
  float* values;         // [NUM_TERMS, num_rows]
  Head student_head;
  Head teacher_head;
  int64_t num_rows;
  int64_t vocab;
  int64_t student_stride; // in elements of the input type
  int64_t teacher_stride;
  float temperature;
  float beta;          // of JSD
  int32_t input_type;  // of products
  int32_t output_type; // of gradients: a row starts where its products did
  int32_t terms;       // bit mask of the terms that are measured
  int32_t num_threads; // of the host
  Factors student_factors; // the host makes the likeliest products anew from them
  Factors teacher_factors;
};

inline Mode mode_of(const Arguments& a) {
  if (a.terms & (1 << REVERSE_KL | 1 << JSD)) return GENERAL;
  return a.terms & (1 << FORWARD_KL | 1 << AGREEMENT) ? FORWARD : LABELS;
}

// ---- numbers of one kind: float, or on the host a vector of floats ------------------------------------------------------------------

struct bfloat16 {
  uint16_t bits;
};

KD_FN int32_t bits_of(float x) {
  int32_t bits;
  memcpy(&bits, &x, 4);
  return bits;
}
KD_FN float of_bits(int32_t bits) {
  float x;
  memcpy(&x, &bits, 4);
  return x;
}
KD_FN float widened(bfloat16 x) { return of_bits(static_cast<int32_t>(static_cast<uint32_t>(x.bits) << 16)); }
KD_FN bfloat16 rounded(float x) {  // to nearest, ties to even; a NaN stays one
  const uint32_t bits = static_cast<uint32_t>(bits_of(x));
  return {static_cast<uint16_t>(x != x ? 0x7fc0u : (bits + 0x7fffu + (bits >> 16 & 1u)) >> 16)};
}

#ifndef __CUDACC__
#if defined(__AVX512F__)
constexpr int LANES = 16;
#else
constexpr int LANES = 8;
#endif
typedef float floats __attribute__((vector_size(4 * LANES)));
typedef int32_t ints __attribute__((vector_size(4 * LANES)));
KD_FN ints bits_of(floats x) { return reinterpret_cast<ints>(x); }
KD_FN floats of_bits(ints bits) { return reinterpret_cast<floats>(bits); }
#endif

template <class V>
KD_FN V all(float x) {
  return V{} + x;
}
template <class V>
KD_FN V larger(V a, V b) {
  return b > a ? b : a;
}

// max(low, x), a NaN of x for itself.
template <class V>
KD_FN V at_least(float low, V x) {
#if defined(__AVX512F__) && !defined(__CUDACC__)
  if constexpr (sizeof(V) == 64) return V(_mm512_max_ps(_mm512_set1_ps(low), __m512(x)));
#endif
  return x < all<V>(low) ? all<V>(low) : x;
}

// e^x for x ≤ 0; below −87 about 1e-38. Cephes' polynomial: 2 units in the last place.
template <class V>
KD_FN V exp_of(V x) {
  x = at_least<V>(-87.0f, x);
  const V shifted = x * 1.44269504f + 12582912.0f;  // the nearest integer stands in the low bits
  const V n = shifted - 12582912.0f;
  const V r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
  V y = r * 1.9875691500e-4f + 1.3981999507e-3f;
  y = y * r + 8.3334519073e-3f;
  y = y * r + 4.1665795894e-2f;
  y = y * r + 1.6666665459e-1f;
  y = y * r + 5.0000001201e-1f;
  y = (y * r + 1.0f) * r + 1.0f;
  return y * of_bits((bits_of(shifted) << 23) + 0x3f800000);
}
template <class V>
KD_FN V quotient(V a, V b) {
  return a / b;
}
#ifdef __CUDA_ARCH__
template <>
__device__ __forceinline__ float exp_of<float>(float x) {
  return __expf(x);
}
template <>
__device__ __forceinline__ float quotient<float>(float a, float b) {
  return __fdividef(a, b);
}
#endif

// log x for normal x > 0; exactly 0 at 1. Cephes' polynomial.
template <class V>
KD_FN V log_of(V x) {
  const auto bits = bits_of(x) - 0x3f3504f3;  // of sqrt(1/2)
  const auto exponent = bits >> 23;
  const V m = of_bits(bits_of(x) - (exponent << 23));
  const V f = m - 1.0f;
  V y = f * 7.0376836292e-2f - 1.1514610310e-1f;
  y = y * f + 1.1676998740e-1f;
  y = y * f - 1.2420140846e-1f;
  y = y * f + 1.4249322787e-1f;
  y = y * f - 1.6668057665e-1f;
  y = y * f + 2.0000714765e-1f;
  y = y * f - 2.4999993993e-1f;
  y = y * f + 3.3333331174e-1f;
  const V e = of_bits(exponent + 0x4b400000) - 12582912.0f;  // as a float
  const V square = f * f;
  return (f + (y * (f * square) + e * -2.12194440e-4f - square * 0.5f)) + e * 0.693359375f;
}

template <class V>
KD_FN V tanh_of(V x) {
  const V size = x < all<V>(0.0f) ? -x : x;
  const V e = exp_of<V>(size * -2.0f);
  const V square = x * x;
  const V near = x * (1.0f + square * (-0.333333333f + square * (0.133333333f + square * -0.0539682540f)));
  const V far = quotient<V>(1.0f - e, 1.0f + e);
  return size < all<V>(0.2f) ? near : (x < all<V>(0.0f) ? -far : far);
}

template <class V>
KD_FN V logit_of(V product, V bias, const Head& head) {
  const V logit = (product + bias) * head.scale;
  return head.cap == 0.0f ? logit : head.cap * tanh_of<V>(logit * (1.0f / head.cap));
}

// d logit / d product, by the logit itself: the derivative of c·tanh(x/c) is 1 − (logit/c)².
template <class V>
KD_FN V slope_of(V logit, const Head& head) {
  const V share = head.cap == 0.0f ? all<V>(0.0f) : logit * (1.0f / head.cap);
  return (1.0f - share * share) * head.scale;
}

// ---- first sweep: peak and sum of exponentials --------------------------------------------------------------------------------------

template <class V>
struct Moments {
  V peak = all<V>(-FLT_MAX);
  V sum = all<V>(0.0f);   // of e^((z − peak) / τ)
  V hard = all<V>(0.0f);  // of e^(z − peak), where cross-entropy is asked for and τ is not 1
};

template <class V, int N>
KD_FN void add(Moments<V>& m, const V (&z)[N], float per_temperature, bool hard) {
  V peak = m.peak;
#ifdef __CUDACC__
#pragma unroll
#endif
  for (int k = 0; k < N; ++k) peak = larger(peak, z[k]);
  V sum = all<V>(0.0f), hard_sum = all<V>(0.0f);
#ifdef __CUDACC__
#pragma unroll
#endif
  for (int k = 0; k < N; ++k) sum += exp_of<V>((z[k] - peak) * per_temperature);
  m.sum = m.sum * exp_of<V>((m.peak - peak) * per_temperature) + sum;
  if (hard) {
#ifdef __CUDACC__
#pragma unroll
#endif
    for (int k = 0; k < N; ++k) hard_sum += exp_of<V>(z[k] - peak);
    m.hard = m.hard * exp_of<V>(m.peak - peak) + hard_sum;
  }
  m.peak = peak;
}

KD_FN Moments<float> merged(const Moments<float>& a, const Moments<float>& b, float per_temperature) {
  Moments<float> m;
  m.peak = larger(a.peak, b.peak);
  const float x = a.peak - m.peak, y = b.peak - m.peak;
  m.sum = a.sum * exp_of<float>(x * per_temperature) + b.sum * exp_of<float>(y * per_temperature);
  m.hard = a.hard * exp_of<float>(x) + b.hard * exp_of<float>(y);
  return m;
}

// ---- what the later sweeps know of a row --------------------------------------------------------------------------------------------

struct Row {
  float per_temperature, beta;
  float student_peak, teacher_peak;
  float student_share, teacher_share;  // 1 / sum
  float shift;                         // what (teacher logit − student logit) / τ exceeds log P − log Q by
  float hard_share, hard_log_sum;      // of the softmax at temperature 1
  bool apart;                          // whether that is another one than Q
  float forward, reverse, jsd, hard;   // weights in the gradient, the temperature's power in them
  float reverse_value, student_value;  // KL(Q ‖ P) and KL(Q ‖ M) of this row
};

KD_FN Row row_of(const Arguments& a, int64_t row, const Moments<float>& s, const Moments<float>& t) {
  Row r{};
  r.per_temperature = 1.0f / a.temperature;
  r.beta = a.beta;
  r.student_peak = s.peak;
  r.teacher_peak = t.peak;
  r.student_share = 1.0f / s.sum;
  r.teacher_share = 1.0f / t.sum;
  r.shift = (t.peak - s.peak) * r.per_temperature + logf(t.sum / s.sum);
  r.apart = a.temperature != 1.0f;
  const float hard = r.apart ? s.hard : s.sum;
  r.hard_share = 1.0f / hard;
  r.hard_log_sum = logf(hard);
  if (a.scales != nullptr) {
    const auto scale = [&](Term term) { return a.terms & 1 << term ? a.scales[term * a.num_rows + row] : 0.0f; };
    r.forward = scale(FORWARD_KL) * a.temperature;
    r.reverse = scale(REVERSE_KL) * a.temperature;
    r.jsd = scale(JSD) * a.temperature * (1.0f - a.beta);
    r.hard = scale(CROSS_ENTROPY);
  }
  return r;
}

template <class V>
struct Pair {
  V q, p;
  V difference;      // log P − log Q
  V over_p, over_q;  // log M/P and log M/Q, M = β P + (1 − β) Q
};

template <int MODE, class V>
KD_FN Pair<V> pair_of(V student, V teacher, const Row& r, int terms) {
  Pair<V> x{};
  x.q = exp_of<V>((student - r.student_peak) * r.per_temperature) * r.student_share;
  if constexpr (MODE != LABELS) {
    x.p = exp_of<V>((teacher - r.teacher_peak) * r.per_temperature) * r.teacher_share;
    x.difference = (teacher - student) * r.per_temperature - r.shift;
  }
  if constexpr (MODE == GENERAL) {
    if (terms & 1 << JSD) {
      // from the larger of P and Q: log(1 + share · (e^−|d| − 1)) neither overflows nor cancels, and is 0 at equality
      const V zero = all<V>(0.0f), d = x.difference;
      const V share = d > zero ? all<V>(1.0f - r.beta) : all<V>(r.beta);
      const V mixed = 1.0f + share * (exp_of<V>(d > zero ? -d : d) - 1.0f);
      const V log_mixed = log_of<V>(larger(all<V>(FLT_MIN), mixed));
      x.over_p = d > zero ? log_mixed : log_mixed - d;
      x.over_q = d > zero ? log_mixed + d : log_mixed;
    }
  }
  return x;
}

// ---- second sweep: values -----------------------------------------------------------------------------------------------------------

template <class V>
struct Sums {
  V forward = all<V>(0.0f), reverse = all<V>(0.0f);
  V teacher = all<V>(0.0f), student = all<V>(0.0f);  // KL(P ‖ M), KL(Q ‖ M)
  V agreement = all<V>(0.0f);                        // 1 where a token is the first choice of both
};

// e^x − 1 − x for |x| ≤ 1/4, where that difference would cancel: 1e-7 of itself.
template <class V>
KD_FN V excess_near(V x) {
  return (x * x) * (0.5f + x * (0.166666667f + x * (0.0416666667f + x * (8.33333333e-3f + x * 1.38888889e-3f))));
}

template <int MODE, class V>
KD_FN void add(Sums<V>& sums, const Pair<V>& x, V student, V teacher, const Row& r, int terms) {
  if constexpr (MODE != LABELS) {
    const V d = x.difference;
    sums.forward += d * d < all<V>(0.0625f) ? x.p * excess_near<V>(-d) : (x.q - x.p) + x.p * d;
    if (terms & 1 << AGREEMENT) {
      const V theirs = teacher >= all<V>(r.teacher_peak) ? all<V>(1.0f) : all<V>(0.0f);
      sums.agreement = larger(sums.agreement, student >= all<V>(r.student_peak) ? theirs : all<V>(0.0f));
    }
  }
  if constexpr (MODE == GENERAL) {
    const V d = x.difference;
    sums.reverse += d * d < all<V>(0.0625f) ? x.q * excess_near<V>(d) : (x.p - x.q) - x.q * d;
    if (terms & 1 << JSD) {
      sums.teacher += (1.0f - r.beta) * (x.q - x.p) - x.p * x.over_p;
      sums.student += r.beta * (x.p - x.q) - x.q * x.over_q;
    }
  }
}

KD_FN Sums<float> merged(const Sums<float>& a, const Sums<float>& b) {
  Sums<float> s;
  s.forward = a.forward + b.forward;
  s.reverse = a.reverse + b.reverse;
  s.teacher = a.teacher + b.teacher;
  s.student = a.student + b.student;
  s.agreement = larger(a.agreement, b.agreement);
  return s;
}

KD_FN float at_least_0(float x) { return x < 0.0f ? 0.0f : x; }  // and a NaN stays one

// ``student`` is the logit at the label; NaN where the label is no token.
KD_FN void write_values(const Arguments& a, int64_t row, const Row& r, const Sums<float>& sums, float student) {
  const float squared = a.temperature * a.temperature;
  const bool both = (a.terms & ~(1 << CROSS_ENTROPY)) != 0;
  a.values[FORWARD_KL * a.num_rows + row] = both ? squared * at_least_0(sums.forward) : 0.0f;
  a.values[REVERSE_KL * a.num_rows + row] = squared * at_least_0(sums.reverse);
  a.values[JSD * a.num_rows + row] = squared * at_least_0(a.beta * sums.teacher + (1.0f - a.beta) * sums.student);
  a.values[CROSS_ENTROPY * a.num_rows + row] = a.terms & 1 << CROSS_ENTROPY ? r.hard_log_sum - (student - r.student_peak) : 0.0f;
  a.values[AGREEMENT * a.num_rows + row] = sums.agreement;
}

// ---- third sweep: the gradient ------------------------------------------------------------------------------------------------------

// ``hot`` is 1 at the label and 0 elsewhere.
template <int MODE, class V>
KD_FN V gradient_of(const Pair<V>& x, V student, V hot, const Row& r, const Head& head, int terms) {
  V g = all<V>(0.0f);
  if constexpr (MODE != LABELS) g = r.forward * (x.q - x.p);
  if constexpr (MODE == GENERAL) {
    g -= r.reverse * (x.q * (x.difference + r.reverse_value));
    if (terms & 1 << JSD) g -= r.jsd * (x.q * (x.over_q + r.student_value));
  }
  if (terms & 1 << CROSS_ENTROPY) {
    const V soft = r.apart ? exp_of<V>(student - r.student_peak) * r.hard_share : x.q;
    g += r.hard * (soft - hot);
  }
  return g * slope_of<V>(student, head);
}

}  // namespace kd
