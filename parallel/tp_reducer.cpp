#include "parallel/tp_reducer.h"

#include <array>

#include "core/errors.h"

namespace tforge {

void TpReducer::reduce(Stream& stream, const ConstTensorView& part, const TensorView& total, ReduceOp op) {
  if (part.data != total.data) throw InternalError("a rank's part is reduced in place");
  if (!is_identity()) tp_.all_reduce(stream, total, op);
}

void TpReducer::sum(Stream& stream, ConstTensorView parts, TensorView total) {
  reduce(stream, parts, total, ReduceOp::sum);
}

void TpReducer::max(Stream& stream, ConstTensorView parts, TensorView total) {
  reduce(stream, parts, total, ReduceOp::max);
}

namespace {

/// `stacked` holds parts of `rows` rows one below the other.
std::span<const ConstTensorView> unstacked(const ConstTensorView& stacked, std::int64_t rows,
                                           std::array<ConstTensorView, kMaxShards>& parts) {
  const std::int64_t count = rows == 0 ? 0 : stacked.rows() / rows;
  if (count > kMaxShards || count * rows != stacked.rows()) {
    throw InternalError("{} rows of parts of {} rows", stacked.rows(), rows);
  }
  for (std::int64_t s = 0; s < count; ++s) parts[static_cast<std::size_t>(s)] = stacked.row_range(s * rows, rows);
  return std::span<const ConstTensorView>(parts).first(static_cast<std::size_t>(count));
}

}  // namespace

void ShardReducer::sum(Stream& stream, ConstTensorView parts, TensorView total) {
  std::array<ConstTensorView, kMaxShards> views;
  sum_.sum(stream, unstacked(parts, total.rows(), views), total);
}

void ShardReducer::max(Stream& stream, ConstTensorView parts, TensorView total) {
  std::array<ConstTensorView, kMaxShards> views;
  sum_.max(stream, unstacked(parts, total.rows(), views), total);
}

}  // namespace tforge
