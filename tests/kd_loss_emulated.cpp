// The kernels of kd_loss.cu on a CPU: every thread of a row is a fiber that runs until it has to wait for others. In which order they run is
// chosen by a seed, so that a missing barrier shows as a wrong number.
#include <ucontext.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <random>
#include <vector>

#define KD_EMULATED
#define __global__
#define __device__
#define __forceinline__ inline
#define __launch_bounds__(...)

struct Index {
  unsigned x;
};
static Index threadIdx, blockIdx, blockDim;

namespace emulator {

constexpr size_t STACK = 64 * 1024, SHARED = 232448;
struct Barrier {
  int arrived = 0, generation = 0;
};
struct Fiber {
  ucontext_t context;
  std::vector<char> stack = std::vector<char>(STACK);
  unsigned thread = 0, rank = 0;
  Barrier* at = nullptr;
  int generation = 0;
  bool done = false;
};
struct Block {
  std::vector<unsigned char> shared;
  Barrier barrier;
  std::vector<Barrier> warps;
  std::vector<unsigned char> lanes;  // 64 bytes a thread: what it shows the others of its warp
};

static ucontext_t scheduler;
static std::vector<Fiber>* fibers;
static std::vector<Block>* blocks;
static Barrier cluster;
static Fiber* now;
static unsigned first_block;
static std::function<void()> body;

static int living(const std::function<bool(const Fiber&)>& member) {
  int count = 0;
  for (const Fiber& fiber : *fibers) count += !fiber.done && member(fiber);
  return count;
}

// Wait until all living fibers that ``member`` names have come here.
static void wait(Barrier& barrier, const std::function<bool(const Fiber&)>& member) {
  if (++barrier.arrived >= living(member)) {
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

static void run_row(unsigned row, unsigned num_blocks, unsigned num_threads, std::mt19937& random) {
  std::vector<Fiber> all(num_blocks * num_threads);
  std::vector<Block> places(num_blocks);
  for (Block& block : places) {
    block.shared.assign(SHARED, 0xff);  // NaN wherever nothing was written
    block.warps.resize(num_threads / 32);
    block.lanes.resize(64 * num_threads);
  }
  fibers = &all;
  blocks = &places;
  cluster = {};
  first_block = row * num_blocks;
  blockDim.x = num_threads;
  for (unsigned k = 0; k < all.size(); ++k) {
    all[k].thread = k % num_threads;
    all[k].rank = k / num_threads;
    getcontext(&all[k].context);
    all[k].context.uc_stack.ss_sp = all[k].stack.data();
    all[k].context.uc_stack.ss_size = STACK;
    all[k].context.uc_link = &scheduler;
    makecontext(&all[k].context, enter, 0);
  }
  for (bool moved = true; moved;) {
    moved = false;
    const unsigned start = random() % all.size(), step = random() % 2 ? 1 : all.size() - 1;
    for (unsigned k = 0; k < all.size(); ++k) {
      Fiber& fiber = all[(start + size_t(k) * step) % all.size()];
      if (fiber.done || (fiber.at != nullptr && fiber.at->generation == fiber.generation)) continue;
      moved = true;
      if (random() % 2) continue;  // left behind, perhaps far
      fiber.at = nullptr;
      now = &fiber;
      threadIdx.x = fiber.thread;
      blockIdx.x = first_block + fiber.rank;
      swapcontext(&scheduler, &fiber.context);
      // a block's memory goes with its last thread
      if (fiber.done && living([&](const Fiber& other) { return other.rank == fiber.rank; }) == 0) places[fiber.rank].shared.assign(SHARED, 0xff);
    }
  }
  if (living([](const Fiber&) { return true; }) > 0) {
    fprintf(stderr, "row %u: threads wait for each other\n", row);
    abort();
  }
}

}  // namespace emulator

static unsigned char* shared_memory() { return (*emulator::blocks)[emulator::now->rank].shared.data(); }
// threadIdx is global here: what a fiber reads after it has waited must be its own again, which the scheduler sees to.
static void __syncthreads() {
  const unsigned rank = emulator::now->rank;
  emulator::wait((*emulator::blocks)[rank].barrier, [=](const emulator::Fiber& fiber) { return fiber.rank == rank; });
}
static unsigned cluster_size() { return emulator::blocks->size(); }
static unsigned cluster_rank() { return emulator::now->rank; }
static void cluster_sync() {
  emulator::wait(emulator::cluster, [](const emulator::Fiber&) { return true; });
}
template <class T>
static T* in_block(T* mine, unsigned rank) {
  return reinterpret_cast<T*>((*emulator::blocks)[rank].shared.data() + (reinterpret_cast<unsigned char*>(mine) - shared_memory()));
}
template <class T>
static T shuffled(T x, int mask) {
  static_assert(sizeof(T) <= 64, "room");
  const unsigned rank = emulator::now->rank, thread = emulator::now->thread, warp = thread / 32;
  emulator::Block& block = (*emulator::blocks)[rank];
  const auto member = [=](const emulator::Fiber& fiber) { return fiber.rank == rank && fiber.thread / 32 == warp; };
  memcpy(&block.lanes[64 * thread], &x, sizeof(T));
  emulator::wait(block.warps[warp], member);
  memcpy(&x, &block.lanes[64 * (thread ^ mask)], sizeof(T));
  emulator::wait(block.warps[warp], member);
  return x;
}

#include "kd_loss.cu"

// ``num_blocks`` of 0: streamed by one block a row.
extern "C" int kd_loss_emulated(const kd::Arguments* a, int num_blocks, int num_threads, int seed) {
  const kd::Kernel kernel = kd::kernel_of(*a, num_blocks > 0);
  if (kernel == nullptr || (num_blocks > 0 && kd::bytes_on_chip(*a, num_blocks) > int64_t(emulator::SHARED))) return 1;
  std::mt19937 random(seed);
  emulator::body = [=] { kernel(*a); };
  for (int64_t row = 0; row < a->num_rows; ++row) emulator::run_row(row, num_blocks > 0 ? num_blocks : 1, num_threads, random);
  return 0;
}
