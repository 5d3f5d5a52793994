// Rows on a CPU: one thread a row, vectors of floats along it. g++ -O3 -march=native -fopenmp.
#include "rows.h"

namespace kd {
namespace {

constexpr int BLOCK = 8;  // vectors whose exponentials are summed under one peak

#if defined(__GNUC__) && !defined(__clang__)
typedef uint16_t shorts __attribute__((vector_size(2 * LANES)));
#else
typedef uint16_t shorts __attribute__((ext_vector_type(LANES)));
#endif

template <class V>
KD_FN V load(const float* from) {
  V x;
  memcpy(&x, from, sizeof(V));
  return x;
}
template <class V>
KD_FN V load(const bfloat16* from) {
  if constexpr (sizeof(V) == sizeof(float)) {
    return widened(*from);
  } else {
    shorts x;
    memcpy(&x, from, sizeof(x));
    return of_bits(__builtin_convertvector(x, ints) << 16);
  }
}
KD_FN void store(float* to, float x) { memcpy(to, &x, sizeof(x)); }
KD_FN void store(float* to, floats x) { memcpy(to, &x, sizeof(x)); }
KD_FN void store(bfloat16* to, float x) { *to = rounded(x); }
KD_FN void store(bfloat16* to, floats x) {
#if defined(__AVX512BF16__)
  const __m256bh narrow = _mm512_cvtneps_pbh(__m512(x));  // flushes what is below 1e-38
  memcpy(to, &narrow, sizeof(narrow));
#else
  const ints bits = bits_of(x);
  const ints nearest = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  const ints kept = x != x ? ints{} + 0x7fc0 : nearest;
  const shorts narrow = __builtin_convertvector(kept & 0xffff, shorts);
  memcpy(to, &narrow, sizeof(narrow));
#endif
}

// f(floats{}, i) along the row, then f(float{}, i) for what is left.
template <class F>
KD_FN void sweep(int64_t vocab, F&& f) {
  int64_t i = 0;
  for (; i + LANES <= vocab; i += LANES) f(floats{}, i);
  for (; i < vocab; ++i) f(float{}, i);
}

template <class In, bool PLAIN>
struct Logits {
  const In* products;
  const Head& head;
  template <class V>
  KD_FN V at(int64_t i) const {
    const V x = load<V>(products + i);
    if constexpr (PLAIN) return x;
    return logit_of<V>(x, head.bias == nullptr ? all<V>(0.0f) : load<V>(head.bias + i), head);
  }
};

template <class In, bool PLAIN>
Moments<float> moments_of(const Logits<In, PLAIN>& logits, int64_t vocab, float per_temperature, bool hard) {
  Moments<floats> many;
  Moments<float> total;
  int64_t i = 0;
  for (; i + BLOCK * LANES <= vocab; i += BLOCK * LANES) {
    floats z[BLOCK];
    for (int k = 0; k < BLOCK; ++k) z[k] = logits.template at<floats>(i + k * LANES);
    add(many, z, per_temperature, hard);
  }
  for (; i < vocab; ++i) {
    const float z[1] = {logits.template at<float>(i)};
    add(total, z, per_temperature, hard);
  }
  for (int lane = 0; lane < LANES; ++lane) {
    Moments<float> one;
    one.peak = many.peak[lane], one.sum = many.sum[lane], one.hard = many.hard[lane];
    total = merged(total, one, per_temperature);
  }
  return total;
}

// Four at a time: compilers take vectors wider than the machine's to pieces, number by number.
typedef float four_floats __attribute__((vector_size(16)));
typedef double four_doubles __attribute__((vector_size(32)));

float product_of(const float* x, const float* y, int64_t width) {
  four_doubles sums[2] = {};
  int64_t i = 0;
  for (; i + 8 <= width; i += 8) {
    for (int k = 0; k < 2; ++k) {
      const four_doubles a = __builtin_convertvector(load<four_floats>(x + i + 4 * k), four_doubles);
      sums[k] += a * __builtin_convertvector(load<four_floats>(y + i + 4 * k), four_doubles);
    }
  }
  double total = 0.0;
  for (; i < width; ++i) total += static_cast<double>(x[i]) * y[i];
  for (int lane = 0; lane < 4; ++lane) total += sums[0][lane] + sums[1][lane];
  return static_cast<float>(total);
}

constexpr int MOST = 128;

// The products of tokens whose probability is one in MOST or more again, summed in float64, into their places; whether there were any. The gradient
// stands in these few: near convergence, where it is a small difference, their rounding in a float32 product is nearly all of its error.
template <bool PLAIN>
bool made_anew(const Factors& f, int64_t row, float* products, const Head& head, int64_t vocab, const Moments<float>& m, float per_temperature) {
  const Logits<float, PLAIN> logits{products, head};
  const float floor = m.peak + logf(m.sum / MOST) / per_temperature;
  bool any = false;
  const auto again = [&](int64_t i) {
    if (!(logits.template at<float>(i) >= floor)) return;
    products[i] = product_of(f.hidden + row * f.hidden_stride, f.weight + i * f.weight_stride, f.width);
    any = true;
  };
  int64_t i = 0;
  for (; i + BLOCK * LANES <= vocab; i += BLOCK * LANES) {
    floats highest = logits.template at<floats>(i);
    for (int k = 1; k < BLOCK; ++k) highest = larger(highest, logits.template at<floats>(i + k * LANES));
    float top = highest[0];
    for (int lane = 1; lane < LANES; ++lane) top = larger(top, highest[lane]);
    if (top >= floor) {
      for (int64_t j = i; j < i + BLOCK * LANES; ++j) again(j);
    }
  }
  for (; i < vocab; ++i) again(i);
  return any;
}

// Peak and sums of a row, of products made anew where they can be: from memory in the end, so that whoever comes later finds the same.
template <class In, bool PLAIN>
Moments<float> right_moments_of(const Factors& f, int64_t row, In* products, const Head& head, int64_t vocab, float per_temperature, bool hard) {
  const Logits<In, PLAIN> logits{products, head};
  Moments<float> m = moments_of(logits, vocab, per_temperature, hard);
  if constexpr (sizeof(In) == sizeof(float)) {
    const bool anew = f.hidden != nullptr && made_anew<PLAIN>(f, row, products, head, vocab, m, per_temperature);
    if (anew) m = moments_of(logits, vocab, per_temperature, hard);
  }
  return m;
}

Sums<float> folded(const Sums<floats>& many, Sums<float> total) {
  for (int lane = 0; lane < LANES; ++lane) {
    Sums<float> one;
    one.forward = many.forward[lane], one.reverse = many.reverse[lane], one.teacher = many.teacher[lane];
    one.student = many.student[lane], one.agreement = many.agreement[lane];
    total = merged(total, one);
  }
  return total;
}

template <class In, class Out, int MODE, bool PLAIN>
void walk(const Arguments& a, int64_t row) {
  In* const products = static_cast<In*>(a.student) + row * a.student_stride;
  Out* const gradient = reinterpret_cast<Out*>(products);
  const int64_t label = a.labels[row], vocab = a.vocab;
  if (label == IGNORE_INDEX) {
    if (a.scales != nullptr) memset(gradient, 0, vocab * sizeof(Out));
    for (int term = 0; term < NUM_TERMS; ++term) a.values[term * a.num_rows + row] = 0.0f;
    return;
  }
  const Logits<In, PLAIN> students{products, a.student_head};
  In* const their_products = MODE == LABELS ? products : static_cast<In*>(a.teacher) + row * a.teacher_stride;
  const Logits<In, PLAIN> teachers{their_products, a.teacher_head};
  const bool token = label >= 0 && label < vocab, hard = a.terms & 1 << CROSS_ENTROPY;
  const int64_t spot = token ? label : 0;
  const float per_temperature = 1.0f / a.temperature;
  const Head head = PLAIN ? Head{nullptr, 1.0f, 0.0f} : a.student_head;  // constants where it is plain

  const Moments<float> s =
      right_moments_of<In, PLAIN>(a.student_factors, row, products, a.student_head, vocab, per_temperature, hard && a.temperature != 1.0f);
  const Moments<float> t =
      MODE == LABELS ? s : right_moments_of<In, PLAIN>(a.teacher_factors, row, their_products, a.teacher_head, vocab, per_temperature, false);
  const float student_there = students.template at<float>(spot), teacher_there = teachers.template at<float>(spot);
  Row r = row_of(a, row, s, t);

  Sums<floats> many;
  Sums<float> total;
  auto measure = [&](auto kind, int64_t i) {
    using V = decltype(kind);
    const V z = students.template at<V>(i), theirs = teachers.template at<V>(i);
    const Pair<V> x = pair_of<MODE, V>(z, theirs, r, a.terms);
    if constexpr (sizeof(V) == sizeof(floats)) {
      add<MODE, V>(many, x, z, theirs, r, a.terms);
    } else {
      add<MODE, V>(total, x, z, theirs, r, a.terms);
    }
  };
  const bool first = MODE == GENERAL || (MODE == FORWARD && a.scales == nullptr);
  if (first) {
    sweep(vocab, measure);
    total = folded(many, total);
    r.reverse_value = at_least_0(total.reverse);
    r.student_value = at_least_0(total.student);
  }
  if (a.scales != nullptr) {
    sweep(vocab, [&](auto kind, int64_t i) {
      using V = decltype(kind);
      const V z = students.template at<V>(i), theirs = teachers.template at<V>(i);
      const Pair<V> x = pair_of<MODE, V>(z, theirs, r, a.terms);
      if constexpr (MODE == FORWARD && sizeof(V) == sizeof(floats)) add<MODE, V>(many, x, z, theirs, r, a.terms);
      if constexpr (MODE == FORWARD && sizeof(V) == sizeof(float)) add<MODE, V>(total, x, z, theirs, r, a.terms);
      store(gradient + i, gradient_of<MODE, V>(x, z, all<V>(0.0f), r, head, a.terms));
    });
    if (hard && token) {
      const Pair<float> x = pair_of<MODE, float>(student_there, teacher_there, r, a.terms);
      store(gradient + label, gradient_of<MODE, float>(x, student_there, 1.0f, r, head, a.terms));
    }
    if (MODE == FORWARD) total = folded(many, total);
  }
  write_values(a, row, r, total, token ? student_there : NAN);
}

bool plain(const Head& head) { return head.bias == nullptr && head.scale == 1.0f && head.cap == 0.0f; }

using Walk = void (*)(const Arguments&, int64_t);

template <class In, class Out>
Walk walk_of(const Arguments& a) {
  static const Walk walks[2][3] = {
      {walk<In, Out, LABELS, false>, walk<In, Out, FORWARD, false>, walk<In, Out, GENERAL, false>},
      {walk<In, Out, LABELS, true>, walk<In, Out, FORWARD, true>, walk<In, Out, GENERAL, true>},
  };
  return walks[plain(a.student_head) && plain(a.teacher_head)][mode_of(a)];
}

}  // namespace
}  // namespace kd

// 0, or 1 for types that it does not know.
extern "C" int kd_loss_host(const kd::Arguments* arguments) {
  using namespace kd;
  const Arguments& a = *arguments;
  const int types = a.input_type * 2 + a.output_type;
  if (types != 0 && types != 1 && types != 3) return 1;
  const Walk walk = types == 0   ? walk_of<float, float>(a)
                    : types == 1 ? walk_of<float, bfloat16>(a)
                                 : walk_of<bfloat16, bfloat16>(a);
#pragma omp parallel for schedule(dynamic, 4) num_threads(a.num_threads)
  for (int64_t row = 0; row < a.num_rows; ++row) walk(a, row);
  return 0;
}

extern "C" int64_t kd_loss_arguments_size() { return sizeof(kd::Arguments); }
