// Rows of the product, for one set of instructions: included once for each, after its Vectors, inside its namespace.
//
// A thread takes ROWS rows at a time, over blocks of columns whose x stays in the first-level cache. A weight is expanded once for all rows of
// x: into registers for up to DIRECT of them; where registers are few, for more of them into a buffer in that cache, from which a dense product
// takes it. Two to eight rows of the weight go side by side, so that sums do not wait for each other and x is loaded once.
//
// Vectors: an expansion covers STEP columns and yields Numbers<T>::PARTS Pieces of X, which is what x becomes, too: floats, or bf16 where the
// processor multiplies them.

constexpr int ROWS = 16;                 // whose sums and places in the values are kept between blocks
constexpr bool WIDE = Vectors::REGISTERS == 32;
constexpr int DIRECT = WIDE ? 8 : 4;     // rows of x whose sums stay in registers while weights are expanded there, too
constexpr int MOST = WIDE ? DIRECT : 16; // rows of x that share an expansion
constexpr int BESIDE = 4;                // rows of the weight that are multiplied side by side when they stand expanded in memory
constexpr int PADDING = 64;              // to which rows of x are rounded up, and values beyond the last that may be read
constexpr int64_t CACHED_BYTES = 16384;  // of x in a block of columns: half of the first-level cache, which tables and values share
constexpr int64_t SHORT_ROW = 2048;      // bytes of values
constexpr int64_t MOST_GROUPS = 8;       // of ROWS rows that a thread takes at a time

template <class T>
struct Walk {
  const T* values;
  const uint8_t* bits;
};
template <class T>
using X = typename Vectors::Numbers<T>::X;
template <class T>
using Piece = typename Vectors::Numbers<T>::Piece;
template <class T>
constexpr int PARTS = Vectors::Numbers<T>::PARTS;
template <class T>
constexpr int LANES = Vectors::STEP / PARTS<T>;  // columns of a piece

// What is asked for before it is read, since the processor does not see in time which way rows go on; 0: nothing is.
//
// Short rows end too soon: the bytes of the rows after these are asked for while these are multiplied. Rows of several blocks take turns at every
// block of columns, so that each is read for a short while only: the bytes of its next block are asked for. A long row at one go needs neither, and
// asking costs a tenth.
struct Ahead {
  int64_t values, bits;         // bytes of a row, on average
  int64_t next, bits_of_block;  // bytes of a row's block, on average
};
template <class T>
static inline __attribute__((always_inline)) void ask_rows(const Walk<T>& walk, const Ahead& ahead, int rows) {
  const char* const values = reinterpret_cast<const char*>(walk.values) + ahead.values * rows;
  const char* const bits = reinterpret_cast<const char*>(walk.bits) + ahead.bits * rows;
  for (int64_t i = 0; i < ahead.values * rows; i += 64) __builtin_prefetch(values + i, 0, 2);
  for (int64_t i = 0; i < ahead.bits * rows; i += 64) __builtin_prefetch(bits + i, 0, 2);
}
template <class T>
static inline __attribute__((always_inline)) void ask_block(const T* values, const uint8_t* bits, const Ahead& ahead) {
  __builtin_prefetch(reinterpret_cast<const char*>(values) + ahead.next, 0, 2);
  __builtin_prefetch(bits + ahead.bits_of_block, 0, 2);
}

// R rows of the weight, N rows of x, ``steps`` expansions. x [N, stride] stands at the block's first column. A single row of x is a long block.
template <class T, int R, int N>
static inline __attribute__((always_inline)) void tile(Walk<T>* walks, const X<T>* x, int64_t stride, int64_t steps, const Ahead& ahead,
                                                       Vectors::Floats* sums) {
  Vectors::Floats sum[R][N];
  const T* values[R];
  const uint8_t* bits[R];
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) {
    values[r] = walks[r].values;
    bits[r] = walks[r].bits;
#pragma GCC unroll 8
    for (int n = 0; n < N; ++n) sum[r][n] = sums[r * N + n];
  }
  for (int64_t s = 0; s < steps; ++s) {
    Piece<T> weight[R][PARTS<T>];
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      const uint32_t kept = Vectors::bits(bits[r] + s * (Vectors::STEP / 8));
      const auto expanded = Vectors::expand(values[r], kept);
#pragma GCC unroll 2
      for (int p = 0; p < PARTS<T>; ++p) weight[r][p] = expanded.part[p];
      if (N > 1) ask_block(values[r], bits[r] + s * (Vectors::STEP / 8), ahead);
      values[r] += Vectors::count(kept);
    }
#pragma GCC unroll 8
    for (int n = 0; n < N; ++n) {
#pragma GCC unroll 2
      for (int p = 0; p < PARTS<T>; ++p) {
        Piece<T> input = Vectors::load(x + n * stride + s * Vectors::STEP + p * LANES<T>);
        if (R > 1) Vectors::hold(input);
#pragma GCC unroll 8
        for (int r = 0; r < R; ++r) sum[r][n] = Vectors::fma(weight[r][p], input, sum[r][n]);
      }
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) {
    walks[r].values = values[r];
    walks[r].bits = bits[r] + steps * (Vectors::STEP / 8);
#pragma GCC unroll 8
    for (int n = 0; n < N; ++n) sums[r * N + n] = sum[r][n];
  }
}

// Rows that go side by side for N rows of x: as many as leave registers for the weights.
constexpr int rows_beside(int n) { return !WIDE ? (n == 1 ? 4 : 2) : n == 1 ? 8 : n <= 6 ? 4 : 3; }

// R rows of the weight, expanded into memory, [R, steps · STEP].
template <class T, int R>
static inline __attribute__((always_inline)) void expand_tile(Walk<T>* walks, int64_t steps, const Ahead& ahead, X<T>* to) {
  for (int r = 0; r < R; ++r) {
    const T* values = walks[r].values;
    const uint8_t* const bits = walks[r].bits;
    for (int64_t s = 0; s < steps; ++s) {
      const uint32_t kept = Vectors::bits(bits + s * (Vectors::STEP / 8));
      const auto weight = Vectors::expand(values, kept);
      ask_block(values, bits + s * (Vectors::STEP / 8), ahead);
      values += Vectors::count(kept);
      for (int p = 0; p < PARTS<T>; ++p) Vectors::store(to + (r * steps + s) * Vectors::STEP + p * LANES<T>, weight.part[p]);
    }
    walks[r] = {values, bits + steps * (Vectors::STEP / 8)};
  }
}

// R expanded rows times N rows of x; the sums of row r stand ``apart`` from those of the next.
template <class T, int R, int N>
static inline __attribute__((always_inline)) void dense_tile(const X<T>* weight, const X<T>* x, int64_t stride, int64_t length,
                                                             Vectors::Floats* sums, int apart) {
  Vectors::Floats sum[R][N];
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
    for (int n = 0; n < N; ++n) sum[r][n] = sums[r * apart + n];
  for (int64_t c = 0; c < length; c += LANES<T>) {
    Piece<T> input[N];
#pragma GCC unroll 8
    for (int n = 0; n < N; ++n) {
      input[n] = Vectors::load(x + n * stride + c);
      Vectors::hold(input[n]);
    }
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      Piece<T> one = Vectors::load(weight + r * length + c);
      Vectors::hold(one);
#pragma GCC unroll 8
      for (int n = 0; n < N; ++n) sum[r][n] = Vectors::fma(one, input[n], sum[r][n]);
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
    for (int n = 0; n < N; ++n) sums[r * apart + n] = sum[r][n];
}

// A block of columns for ``count`` rows of the weight and all rows of x, weights expanded in registers (N) or in memory (N = 0).
template <class T, int N>
static void block_of(Walk<T>* walks, int count, const X<T>* x, int64_t stride, int64_t steps, int num, const Ahead& ahead, X<T>* room,
                     Vectors::Floats* sums) {
  int r = 0;
  if constexpr (N > 0) {
    constexpr int R = rows_beside(N);
    for (; r + R <= count; r += R) {
      ask_rows(walks[r], ahead, R);
      tile<T, R, N>(walks + r, x, stride, steps, ahead, sums + r * N);
    }
    for (; r < count; ++r) tile<T, 1, N>(walks + r, x, stride, steps, ahead, sums + r * N);
  } else {
    const int64_t length = steps * Vectors::STEP;
    for (; r + BESIDE <= count; r += BESIDE) {
      ask_rows(walks[r], ahead, BESIDE);
      expand_tile<T, BESIDE>(walks + r, steps, ahead, room);
      int n = 0;
      for (; n + 3 <= num; n += 3) dense_tile<T, BESIDE, 3>(room, x + n * stride, stride, length, sums + r * num + n, num);
      for (; n < num; ++n) dense_tile<T, BESIDE, 1>(room, x + n * stride, stride, length, sums + r * num + n, num);
    }
    for (; r < count; ++r) {
      expand_tile<T, 1>(walks + r, steps, ahead, room);
      for (int n = 0; n < num; ++n) dense_tile<T, 1, 1>(room, x + n * stride, stride, length, sums + r * num + n, num);
    }
  }
}

// Up to ROWS rows of the weight from ``first`` on, times ``num`` rows of x from ``from`` on; N is num where it is small, else 0.
template <class T, int N>
static void rows_of(const Arguments& a, const X<T>* x, int64_t stride, int64_t first, int count, int64_t from, int num) {
  constexpr int BYTES = Vectors::STEP / 8;
  const int64_t row_bytes = (a.cols + 7) / 8, whole = row_bytes / BYTES;
  const T* const values = static_cast<const T*>(a.values);
  Walk<T> walks[ROWS];
  Vectors::Floats sums[ROWS * (N > 0 ? N : MOST)];
  constexpr int64_t CACHED = CACHED_BYTES / sizeof(X<T>);
  alignas(64) X<T> room[N > 0 ? 1 : CACHED];
  std::vector<T> copies;  // of the last rows, whose expansions would read beyond the values
  for (int r = 0; r < count; ++r) walks[r] = {values + a.row_starts[first + r], a.bitmap + (first + r) * row_bytes};
  for (int k = 0; k < count * num; ++k) sums[k] = Vectors::zero();
  const int64_t begin = a.row_starts[first], end = a.row_starts[first + count];
  if (end + PADDING > a.row_starts[a.rows]) {
    copies.resize(end - begin + PADDING);
    if (end > begin) memcpy(copies.data(), values + begin, (end - begin) * sizeof(T));
    for (int r = 0; r < count; ++r) walks[r].values = copies.data() + (a.row_starts[first + r] - begin);
  }

  const int64_t block = CACHED / (N > 0 ? N : num + BESIDE) / Vectors::STEP;
  const int64_t row = (end - begin) * int64_t(sizeof(T)) / count;
  const Ahead ahead = whole > block ? Ahead{0, 0, row * block / whole, block * BYTES} : row <= SHORT_ROW ? Ahead{row, row_bytes, 0, 0} : Ahead{};
  for (int64_t done = 0; done < whole; done += block) {
    const int64_t steps = whole - done < block ? whole - done : block;
    block_of<T, N>(walks, count, x + from * stride + done * Vectors::STEP, stride, steps, num, ahead, room, sums);
  }
  if (whole * BYTES < row_bytes) {
    for (int r = 0; r < count; ++r) {
      uint8_t last[BYTES] = {};
      memcpy(last, walks[r].bits, row_bytes - whole * BYTES);
      walks[r].bits = last;
      block_of<T, N>(walks + r, 1, x + from * stride + whole * Vectors::STEP, stride, 1, num, Ahead{}, room, sums + r * num);
    }
  }

  for (int r = 0; r < count; ++r) {
    const float bias = a.bias == nullptr ? 0.0f : widened(static_cast<const T*>(a.bias)[first + r]);
    for (int n = 0; n < num; ++n) narrow(Vectors::sum(sums[r * num + n]) + bias, static_cast<T*>(a.y) + (from + n) * a.rows + first + r);
  }
}

template <class T>
static void group(const Arguments& a, const X<T>* x, int64_t stride, int64_t first, int count) {
  using Rows = void (*)(const Arguments&, const X<T>*, int64_t, int64_t, int, int64_t, int);
  static constexpr Rows few[] = {rows_of<T, 1>, rows_of<T, 2>, rows_of<T, 3>, rows_of<T, 4>};
  static constexpr Rows many[] = {rows_of<T, WIDE ? 5 : 0>, rows_of<T, WIDE ? 6 : 0>, rows_of<T, WIDE ? 7 : 0>, rows_of<T, WIDE ? 8 : 0>};
  const int64_t passes = (a.num + MOST - 1) / MOST;
  for (int64_t pass = 0; pass < passes; ++pass) {
    const int64_t from = a.num * pass / passes, num = a.num * (pass + 1) / passes - from;
    (num <= 4 ? few[num - 1] : many[std::min<int64_t>(num, 8) - 5])(a, x, stride, first, count, from, int(num));
  }
}

// Numbers between rows of x: whole cache lines, and never a multiple of 2 KB, where rows would drive each other out of the first-level cache.
static int64_t stride_of(int64_t cols, int64_t bytes) {
  const int64_t padded = (cols + PADDING - 1) / PADDING * PADDING;
  return padded * bytes % 2048 == 0 ? padded + 1024 / bytes : padded;
}

// x in the order in which weights come out of their expansion, [num, stride], 0 beyond the columns.
template <class T>
static void arrange(const Arguments& a, X<T>* to, int64_t stride) {
  for (int64_t n = 0; n < a.num; ++n) {
    const T* const from = static_cast<const T*>(a.x) + n * a.x_stride;
    X<T>* const row = to + n * stride;
    for (int64_t start = 0; start < a.cols; start += Vectors::STEP) {
      for (int c = 0; c < Vectors::STEP; ++c) {
        X<T>& there = row[start + Vectors::place<T>(c)];
        if (start + c >= a.cols) {
          there = X<T>{};
        } else if constexpr (std::is_same<X<T>, T>::value) {
          there = from[start + c];
        } else {
          there = widened(from[start + c]);
        }
      }
    }
  }
}

template <class T>
static void multiply(const Arguments& a) {
  static thread_local std::vector<X<T>> scratch;
  constexpr int64_t LINE = 64 / sizeof(X<T>);
  const int64_t stride = stride_of(a.cols, sizeof(X<T>)), groups = (a.rows + ROWS - 1) / ROWS;
  scratch.resize(a.num * stride + LINE);
  X<T>* const x = reinterpret_cast<X<T>*>((reinterpret_cast<uintptr_t>(scratch.data()) + 63) / 64 * 64);
  arrange<T>(a, x, stride);
  const bool small = a.row_starts[a.rows] * a.num < ALONE;
  // Neighbours stay with one thread, which asks for the bytes of the next rows ahead; a thread that others disturb leaves its last quarter to the rest.
  const int64_t together = std::clamp<int64_t>(groups / (4 * a.num_threads), 1, MOST_GROUPS);
#pragma omp parallel for schedule(dynamic, together) num_threads(small ? 1 : a.num_threads)
  for (int64_t g = 0; g < groups; ++g) group<T>(a, x, stride, g * ROWS, g * ROWS + ROWS <= a.rows ? ROWS : int(a.rows - g * ROWS));
}

static bool multiply(const Arguments& a) {
  if (a.type == FLOAT32) {
    multiply<float>(a);
  } else if (a.type == BFLOAT16) {
    multiply<bfloat16>(a);
  } else if (a.type == FLOAT16) {
    multiply<float16>(a);
  } else {
    return false;
  }
  return true;
}
