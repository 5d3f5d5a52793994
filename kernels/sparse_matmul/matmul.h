// y = x · Wᵀ for a weight of which only what is not 0 is stored: a bit a weight, and the values row by row. What callers pass, on every machine.
#pragma once

#include <cstdint>

namespace sparse {

enum Type : int32_t { FLOAT32 = 0, BFLOAT16 = 1, FLOAT16 = 2 };

struct Arguments {
  const uint8_t* bitmap;      // [rows, ceil(cols / 8)], bit j of byte i is column 8 i + j
  const void* values;         // [row_starts[rows]]
  const int64_t* row_starts;  // [rows + 1]
  const void* x;              // [num, cols]
  const void* bias;           // [rows] or null
  void* y;                    // [num, rows]
  int64_t rows, cols, num;
  int64_t x_stride;           // elements between rows of x
  int32_t type;               // of values, x, bias and y; sums are float32
  int32_t num_threads;
  int32_t instructions;       // 0: the best of this processor
};

}  // namespace sparse
