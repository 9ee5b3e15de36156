#include "kernels/embedding.h"

#include <limits>

#include "kernels/check.h"
#include "kernels/cpu/embedding.h"
#include "kernels/cuda/embedding.h"
#include "kernels/dispatch.h"
#include "kernels/work.h"

namespace tforge::kernels {

void embedding_forward(Stream& stream, ConstTensorView tokens, ConstTensorView table, std::int64_t first_row,
                       TensorView y) {
  constexpr const char* kOp = "embedding_forward";
  check_device(kOp, stream, tokens, table, y);
  check_matrix(kOp, "y", y, table.dtype, tokens.elements(), table.columns());
  check_matrix(kOp, "table", table, table.dtype, table.rows(), table.columns());
  check_vector(kOp, "tokens", tokens, DType::i32, tokens.elements());
  const ProfileScope scope(stream, kOp, {0, 2 * bytes_of(y)});
  with_stored_type(kOp, stream, table.dtype, [&](auto t) {
    using T = decltype(t);
    on_device<T>(
        stream, [&](auto) { cpu::embedding_forward<T>(tokens, table, first_row, y); },
        [&](auto) { cuda::embedding_forward<T>(stream, tokens.as<std::int32_t>(), table, first_row, y); });
  });
}

void embedding_backward(Stream& stream, ConstTensorView tokens, ConstTensorView dy, std::int64_t first_row,
                        GradMode mode, TensorView dtable, TensorView workspace) {
  constexpr const char* kOp = "embedding_backward";
  constexpr std::int64_t kMost = std::numeric_limits<std::int32_t>::max();
  check_device(kOp, stream, tokens, dy, dtable, workspace);
  check_vector(kOp, "tokens", tokens, DType::i32, tokens.elements());
  check_matrix(kOp, "dtable", dtable, compute_dtype(dy.dtype), dtable.rows(), dtable.columns());
  check_matrix(kOp, "dy", dy, dy.dtype, tokens.elements(), dtable.columns());
  if (tokens.elements() > kMost || dtable.rows() > kMost) {
    throw ShapeError("{}: {} tokens, {} rows; positions are 32 bits", kOp, tokens.elements(), dtable.rows());
  }
  check_workspace(kOp, workspace, DType::i32, embedding_workspace(tokens.elements(), dtable.rows()));
  const double read = bytes_of(dy) * (mode == GradMode::accumulate ? 2 : 1);
  const ProfileScope scope(
      stream, kOp,
      {static_cast<double>(dy.elements()), read + (mode == GradMode::overwrite ? bytes_of(dtable) : bytes_of(dy))});
  with_stored_type(kOp, stream, dy.dtype, [&](auto t) {
    using T = decltype(t);
    on_device<T>(
        stream, [&](auto) { cpu::embedding_backward<T>(tokens, dy, first_row, mode, dtable, workspace); },
        [&](auto) {
          cuda::embedding_backward<T>(stream, tokens.as<std::int32_t>(), dy, first_row, mode, dtable,
                                      workspace.as<std::int32_t>());
        });
  });
}

std::int64_t embedding_workspace(std::int64_t tokens, std::int64_t rows) { return tokens + rows; }

}  // namespace tforge::kernels
