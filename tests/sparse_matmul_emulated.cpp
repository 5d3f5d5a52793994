// The kernels of sparse_matmul that this machine cannot run, on its CPU. Those of sparse_matmul.cu: every thread of a block is a fiber that runs
// until it has to wait for others, in an order chosen by a seed, and asynchronous copies arrive when they are waited for and not before, so that
// a missing barrier shows as a wrong number. Those of avx512.h and avx512_bf16.h: their instructions, lane by lane.
#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <random>
#include <type_traits>
#include <vector>

#include "numbers.h"

// ---- AVX-512 ---------------------------------------------------------------------------------------------------------------------------

namespace lanes {

struct Floats {
  float lane[16];
};
struct Integers {
  uint16_t lane[32];
};
struct Half {
  uint16_t lane[16];
};
using __mmask16 = uint16_t;

static Floats _mm512_setzero_ps() { return {}; }
static Floats _mm512_loadu_ps(const void* from) {
  Floats x;
  memcpy(&x, from, sizeof(x));
  return x;
}
static void _mm512_storeu_ps(void* to, Floats x) { memcpy(to, &x, sizeof(x)); }
static Integers _mm512_loadu_si512(const void* from) {
  Integers x;
  memcpy(&x, from, sizeof(x));
  return x;
}
static Floats _mm512_fmadd_ps(Floats a, Floats b, Floats c) {
  for (int i = 0; i < 16; ++i) c.lane[i] = std::fma(a.lane[i], b.lane[i], c.lane[i]);
  return c;
}
static float _mm512_reduce_add_ps(Floats x) {
  float sum = 0.0f;
  for (float one : x.lane) sum += one;
  return sum;
}
template <class V, class M>
static V expanded(M mask, V from) {
  V to{};
  int next = 0;
  for (unsigned i = 0; i < sizeof(from.lane) / sizeof(from.lane[0]); ++i)
    if (mask >> i & 1) to.lane[i] = from.lane[next++];
  return to;
}
static Integers _mm512_maskz_expand_epi16(uint32_t mask, Integers from) { return expanded(mask, from); }
static Floats _mm512_maskz_expand_ps(uint16_t mask, Floats from) { return expanded(mask, from); }
static Integers _mm512_slli_epi32(Integers x, int by) {
  uint32_t words[16];
  memcpy(words, &x, sizeof(x));
  for (uint32_t& word : words) word <<= by;
  memcpy(&x, words, sizeof(x));
  return x;
}
static Integers _mm512_set1_epi32(int value) {
  int words[16];
  for (int& word : words) word = value;
  Integers x;
  memcpy(&x, words, sizeof(x));
  return x;
}
static Integers _mm512_and_si512(Integers a, Integers b) {
  for (int i = 0; i < 32; ++i) a.lane[i] &= b.lane[i];
  return a;
}
static void _mm512_storeu_si512(void* to, Integers x) { memcpy(to, &x, sizeof(x)); }
static Floats _mm512_dpbf16_ps(Floats sum, Integers a, Integers b) {  // pairs without rounding between; subnormals are 0 on the way in and out
  auto flushed = [](float x) { return std::fabs(x) < 0x1p-126f ? std::copysign(0.0f, x) : x; };
  for (int i = 0; i < 16; ++i) {
    for (int half = 1; half >= 0; --half) {
      const float left = sparse::widened(sparse::bfloat16{a.lane[2 * i + half]}), right = sparse::widened(sparse::bfloat16{b.lane[2 * i + half]});
      sum.lane[i] = flushed(std::fma(flushed(left), flushed(right), flushed(sum.lane[i])));
    }
  }
  return sum;
}
static Floats _mm512_castsi512_ps(Integers x) { return _mm512_loadu_ps(&x); }
static Half _mm512_castsi512_si256(Integers x) {
  Half low;
  memcpy(&low, &x, sizeof(low));
  return low;
}
static Half _mm512_extracti64x4_epi64(Integers x, int which) {
  Half part;
  memcpy(&part, x.lane + 16 * which, sizeof(part));
  return part;
}
static Floats _mm512_cvtph_ps(Half x) {
  Floats to;
  for (int i = 0; i < 16; ++i) to.lane[i] = sparse::widened(sparse::float16{x.lane[i]});
  return to;
}

}  // namespace lanes

#include "matmul.h"

namespace sparse {
namespace {
constexpr int64_t ALONE = 0;
namespace avx512 {
using namespace lanes;
#define __m512 lanes::Floats
#define __m512i lanes::Integers
#define __m512bh lanes::Integers
#define asm(...) static_cast<void>(x)
#include "avx512.h"
#include "rows.h"
}  // namespace avx512
namespace avx512_bf16 {
using namespace lanes;
#include "avx512_bf16.h"
#undef asm
#include "rows.h"
}  // namespace avx512_bf16
}  // namespace
}  // namespace sparse

extern "C" int avx512_emulated(const sparse::Arguments* a) {
  return (a->instructions == 4 ? sparse::avx512_bf16::multiply(*a) : sparse::avx512::multiply(*a)) ? 0 : 1;
}

// ---- CUDA ------------------------------------------------------------------------------------------------------------------------------

#define SPARSE_EMULATED
#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)

struct Index {
  unsigned x, y;
};
static Index threadIdx, blockIdx, gridDim;

namespace emulator {

constexpr size_t STACK = 64 * 1024;
constexpr unsigned NUM_THREADS = 128;
struct Barrier {
  unsigned arrived = 0;
  int generation = 0;
};
struct Copy {
  void* to;
  const void* from;
  int bytes;
};
struct Fiber {
  ucontext_t context;
  std::vector<char> stack = std::vector<char>(STACK);
  unsigned thread = 0;
  Barrier* at = nullptr;
  int generation = 0;
  bool done = false;
  std::vector<std::vector<Copy>> groups = {{}};  // of asynchronous copies; the last is open
};

static ucontext_t scheduler;
static std::vector<Fiber>* fibers;
static std::vector<unsigned char> shared;
static Barrier block;
static Barrier warps[NUM_THREADS / 32];
static unsigned char shown[NUM_THREADS][32];
static Fiber* now;
static std::function<void()> body;

static void wait(Barrier& barrier, unsigned members) {
  if (++barrier.arrived == members) {
    barrier.arrived = 0;
    ++barrier.generation;
    return;
  }
  now->at = &barrier;
  now->generation = barrier.generation;
  swapcontext(&now->context, &scheduler);
}

static void enter() {
  body();
  now->done = true;
  swapcontext(&now->context, &scheduler);
}

static void run_block(size_t bytes, std::mt19937& random) {
  std::vector<Fiber> all(NUM_THREADS);
  shared.assign(bytes, 0xff);  // NaN wherever nothing was written
  fibers = &all;
  block = {};
  for (Barrier& warp : warps) warp = {};
  for (unsigned k = 0; k < NUM_THREADS; ++k) {
    all[k].thread = k;
    getcontext(&all[k].context);
    all[k].context.uc_stack.ss_sp = all[k].stack.data();
    all[k].context.uc_stack.ss_size = STACK;
    all[k].context.uc_link = &scheduler;
    makecontext(&all[k].context, enter, 0);
  }
  for (bool moved = true; moved;) {
    moved = false;
    const unsigned start = random() % NUM_THREADS, step = random() % 2 ? 1 : NUM_THREADS - 1;
    for (unsigned k = 0; k < NUM_THREADS; ++k) {
      Fiber& fiber = all[(start + k * step) % NUM_THREADS];
      if (fiber.done || (fiber.at != nullptr && fiber.at->generation == fiber.generation)) continue;
      moved = true;
      if (random() % 2) continue;  // left behind, perhaps far
      fiber.at = nullptr;
      now = &fiber;
      threadIdx.x = fiber.thread;
      swapcontext(&scheduler, &fiber.context);
    }
  }
  for (const Fiber& fiber : all) {
    if (fiber.done) continue;
    fprintf(stderr, "threads wait for each other\n");
    abort();
  }
}

}  // namespace emulator

static unsigned char* shared_memory() { return emulator::shared.data(); }
static void check_shared(const void* to, int bytes) {
  const unsigned char* const at = static_cast<const unsigned char*>(to);
  if (at < emulator::shared.data() || at + bytes > emulator::shared.data() + emulator::shared.size() || (at - emulator::shared.data()) % bytes) {
    fprintf(stderr, "a copy beyond shared memory, or not aligned\n");
    abort();
  }
}
static void copy_16(void* to, const void* from) {
  check_shared(to, 16);
  emulator::now->groups.back().push_back({to, from, 16});
}
static void copy_4(void* to, const void* from, bool there) {
  check_shared(to, 4);
  emulator::now->groups.back().push_back({to, there ? from : nullptr, 4});
}
static void commit() { emulator::now->groups.push_back({}); }
template <int LEFT>
static void wait() {
  auto& groups = emulator::now->groups;
  while (groups.size() > LEFT + 1) {
    for (const emulator::Copy& copy : groups.front()) copy.from == nullptr ? memset(copy.to, 0, copy.bytes) : memcpy(copy.to, copy.from, copy.bytes);
    groups.erase(groups.begin());
  }
}
static void __syncthreads() { emulator::wait(emulator::block, emulator::NUM_THREADS); }
static void __threadfence() {}
static int __popc(uint32_t bits) { return __builtin_popcount(bits); }
static float __ldcg(const float* from) { return *from; }
static uint32_t atomicAdd(uint32_t* at, uint32_t more) {
  const uint32_t before = *at;
  *at += more;
  return before;
}
template <int TYPE>
static float to_float(uint16_t bits) {
  return TYPE == 1 ? sparse::widened(sparse::bfloat16{bits}) : sparse::widened(sparse::float16{bits});
}
template <int TYPE>
static uint16_t from_float(float x) {
  sparse::bfloat16 wide;
  sparse::float16 half;
  sparse::narrow(x, &wide);
  sparse::narrow(x, &half);
  return TYPE == 1 ? wide.bits : half.bits;
}

// The fragments as the PTX manual gives them for m16n8k16: group = lane / 4, member = lane % 4.
template <int TYPE>
static void mma(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  const unsigned thread = emulator::now->thread, first = thread / 32 * 32, lane = thread % 32;
  memcpy(emulator::shown[thread], a, 16);
  memcpy(emulator::shown[thread] + 16, b, 8);
  emulator::wait(emulator::warps[thread / 32], 32);
  auto number = [&](unsigned owner, unsigned reg, unsigned half) {
    uint32_t words[6];
    memcpy(words, emulator::shown[first + owner], sizeof(words));
    return to_float<TYPE>(uint16_t(words[reg] >> 16 * half));
  };
  for (unsigned i = 0; i < 4; ++i) {
    const unsigned row = lane / 4 + i / 2 * 8, column = lane % 4 * 2 + i % 2;
    for (unsigned k = 0; k < 16; ++k) {
      const unsigned member = k % 8 / 2, half = k % 2, upper = k / 8;
      c[i] += number(row % 8 * 4 + member, row / 8 + 2 * upper, half) * number(column * 4 + member, 4 + upper, half);
    }
  }
  emulator::wait(emulator::warps[thread / 32], 32);
}

#include "sparse_matmul.cu"

// 0, or 1 for arguments that no kernel takes. Blocks come in an order of their own.
extern "C" int sparse_tiles_emulated(const sparse::TileArguments* a, int seed) {
  const sparse::Kernel kernel = sparse::kernel_of(*a);
  if (kernel == nullptr) return 1;
  std::mt19937 random(seed);
  emulator::body = [=] { kernel(*a); };
  gridDim = {unsigned((a->rows + sparse::TILE - 1) / sparse::TILE), unsigned(a->splits)};
  const unsigned blocks = gridDim.x * gridDim.y, start = random() % blocks;
  for (unsigned k = 0; k < blocks; ++k) {
    const unsigned which = (start + k) % blocks;
    blockIdx = {which % gridDim.x, which / gridDim.x};
    emulator::run_block(sparse::bytes_of_block(*a), random);
  }
  return 0;
}
