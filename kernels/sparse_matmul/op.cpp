// The product on a CPU as a torch op, on torch's stable ABI: one library serves every torch from TORCH_TARGET_VERSION on.
// g++ -O3 -march=native -fopenmp, with torch's headers.
#define TORCH_TARGET_VERSION (((0ULL + 2) << 56) | ((0ULL + 11) << 48))

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>

#include "host.h"

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

bool plain(const Tensor& tensor, ScalarType type) { return tensor.is_cpu() && tensor.is_contiguous() && tensor.scalar_type() == type; }

// x [..., cols] to [..., rows]. What would make the kernel read beyond a tensor is refused; that the parts of the weight agree with each other is
// checked where they come from.
Tensor sparse_rows(const Tensor& x, const Tensor& bitmap, const Tensor& values, const Tensor& row_starts, const std::optional<Tensor>& bias) {
  const ScalarType type = x.scalar_type();
  const bool known = type == ScalarType::Float || type == ScalarType::BFloat16 || type == ScalarType::Half;
  STD_TORCH_CHECK(known && values.scalar_type() == type, "sparse_rows: x and values must be float32, bfloat16 or float16, and the same");
  STD_TORCH_CHECK(x.dim() > 0 && bitmap.dim() == 2 && row_starts.dim() == 1, "sparse_rows: x needs columns, and a weight is a bitmap and starts");
  const int64_t cols = x.size(-1), rows = bitmap.size(0);
  const bool fits = x.is_cpu() && bitmap.size(1) == (cols + 7) / 8 && row_starts.size(0) == rows + 1 && plain(values, type) &&
                    plain(bitmap, ScalarType::Byte) && plain(row_starts, ScalarType::Long);
  STD_TORCH_CHECK(fits, "sparse_rows: x of ", cols, " columns does not fit a bitmap of ", rows, " rows of ", bitmap.size(1), " bytes on a CPU");
  STD_TORCH_CHECK(!bias || (bias->numel() == rows && plain(*bias, type)), "sparse_rows: the bias is not one of ", rows, " rows");

  std::vector<int64_t> shape(x.dim());
  for (size_t i = 0; i < shape.size(); ++i) shape[i] = x.size(i);
  shape.back() = rows;
  const Tensor y = torch::stable::new_empty(x, shape);
  if (y.numel() == 0) return y;
  const Tensor dense = x.is_contiguous() ? x : torch::stable::contiguous(x);
  sparse::Arguments arguments{};
  arguments.bitmap = static_cast<const uint8_t*>(bitmap.const_data_ptr());
  arguments.values = values.const_data_ptr();
  arguments.row_starts = static_cast<const int64_t*>(row_starts.const_data_ptr());
  arguments.x = dense.const_data_ptr();
  arguments.bias = bias ? bias->const_data_ptr() : nullptr;
  arguments.y = y.mutable_data_ptr();
  arguments.rows = rows;
  arguments.cols = arguments.x_stride = cols;
  arguments.num = y.numel() / rows;
  arguments.type = type == ScalarType::Float ? sparse::FLOAT32 : type == ScalarType::BFloat16 ? sparse::BFLOAT16 : sparse::FLOAT16;
  arguments.num_threads = int32_t(torch::stable::get_num_threads());
  STD_TORCH_CHECK(sparse_matmul_host(&arguments) == 0, "sparse_rows: the kernel refuses its arguments");
  return y;
}

}  // namespace

// The schema stands where the reference does, in minitron/ops/sparse_rows.py.
STABLE_TORCH_LIBRARY_IMPL(minitron, CPU, library) { library.impl("sparse_rows", TORCH_BOX(&sparse_rows)); }
