#include "autograd/ops/head_cross_entropy.h"

#include <algorithm>
#include <utility>

#include "core/errors.h"
#include "kernels/cross_entropy.h"
#include "kernels/elementwise.h"
#include "kernels/gemm.h"

namespace tforge {

namespace {

using kernels::Transpose;

struct HeadCrossEntropyNode final : Node {
  HeadCrossEntropyNode(const Var& h, const Var& table) : dh(use(h)), dtable(use(table)) {}
  void backward(Tape& tape) override {
    if (!dy().is_seed()) throw InternalError("head_cross_entropy: the loss is not the root of the backward pass");
    if (dh) dh.adopt(tape, std::move(dh_value));
  }
  Grad dh, dtable;
  Tensor dh_value;
};

/// Runs over the chunks; `node` null means forward only. nll [T] f64 is filled when given. The sum of nll.
Tensor run_chunks(Tape& tape, const Var& h, const Var& table, const Tensor& targets, std::int64_t first_row,
                  double weight, Reducer& reducer, const HeadShards& head, HeadCrossEntropyNode* node,
                  const Tensor& nll_out) {
  Stream& stream = tape.stream();
  const std::int64_t rows = h.shape().rows(), vocab = table.shape().rows(), shards = head.rows.count();
  const bool by_shard = reducer.by_shard();
  if (targets.elements() != rows) {
    throw ShapeError("head_cross_entropy: {} targets for {} rows", targets.elements(), rows);
  }
  if (!by_shard && shards > 1) throw ShapeError("head_cross_entropy: {} shards that are not kept apart", shards);
  const std::int64_t step = head_chunk_rows(h.view().device, rows, by_shard ? head.vocab : vocab);
  // Logits and what is summed over them; their gradient is rounded for the products that read it.
  const DType wide = compute_dtype(h.dtype());
  Tensor logits_buffer = tape.empty(Shape{step * vocab}, wide), narrow_buffer;
  if (node != nullptr && wide != h.dtype()) narrow_buffer = tape.empty(Shape{step * vocab}, h.dtype());
  Tensor max_buffer = tape.empty(Shape{shards * step, 1}, wide, Purpose::communication);
  Tensor sum_buffer = tape.empty(Shape{shards * step, 2}, wide, Purpose::communication);
  // Of all shards; where there is one in all, the same. A maximum of its own each shard needs until its sum is
  // rescaled.
  const bool alone = reducer.is_identity() && !by_shard;
  Tensor max_total = max_buffer, sum_total = sum_buffer, dh_buffer;
  if (!alone) max_total = tape.empty(Shape{step, 1}, wide, Purpose::communication);
  if (by_shard) sum_total = tape.empty(Shape{step, 2}, wide, Purpose::communication);
  Tensor nll_buffer = tape.empty(Shape{step}, DType::f64), total = tape.empty(Shape{1}, DType::f64);
  kernels::fill(stream, total.view(), 0);
  const bool wants_dh = node != nullptr && node->dh;
  if (wants_dh) node->dh_value = tape.empty(h.shape(), h.dtype());
  if (wants_dh && by_shard) {
    dh_buffer = tape.empty(Shape{shards * step, h.shape().columns()}, h.dtype(), Purpose::communication);
  }
  for (std::int64_t first = 0; first < rows; first += step) {
    const std::int64_t count = std::min(step, rows - first);
    const ConstTensorView x = h.view().row_range(first, count);
    const Tensor chunk_targets = targets.reshaped(Shape{rows}).rows(first, count);
    const ConstTensorView target = chunk_targets.view();
    const TensorView row_max = max_total.view().row_range(0, count), sums = sum_total.view().row_range(0, count);
    const TensorView row_sum = sums.column_range(0, 1), target_logit = sums.column_range(1, 1);
    const auto part_of = [&](const Tensor& buffer, const RowShards::Range& shard) {
      return buffer.rows(count * shard.first, count * shard.rows).reshaped(Shape{count, shard.rows}).view();
    };
    const auto own_max = [&](std::int64_t s) { return max_buffer.view().row_range(s * count, count); };
    const auto own_sums = [&](std::int64_t s) { return sum_buffer.view().row_range(s * count, count); };
    const auto logits_of = [&](const RowShards::Range& shard) { return part_of(logits_buffer, shard); };
    Tensor nll = nll_out ? nll_out.rows(first, count) : nll_buffer.rows(0, count);

    for (std::int64_t s = 0; s < shards; ++s) {
      const RowShards::Range shard = head.rows.range(s, vocab);
      const TensorView logits = logits_of(shard);
      kernels::gemm(stream, Transpose::no, Transpose::yes, 1.0, x, table.view().row_range(shard.first, shard.rows),
                    GradMode::overwrite, logits);
      const TensorView own = own_sums(s);
      kernels::cross_entropy_row_statistics(stream, logits, target, first_row + shard.first, own_max(s),
                                            own.column_range(0, 1), own.column_range(1, 1));
    }
    if (!alone) {
      const TensorView all_max = max_buffer.view().row_range(0, shards * count);
      if (!by_shard) kernels::add_to(stream, all_max, GradMode::overwrite, row_max);
      reducer.max(stream, by_shard ? all_max : row_max, row_max);
      for (std::int64_t s = 0; s < shards; ++s) {
        kernels::cross_entropy_rescale(stream, own_max(s), row_max, own_sums(s).column_range(0, 1));
      }
      reducer.sum(stream, sum_buffer.view().row_range(0, shards * count), sums);
    }
    kernels::cross_entropy_nll(stream, row_max, row_sum, target_logit, target, nll.view());
    kernels::sum_to(stream, nll.view(), GradMode::accumulate, total.view());

    if (node == nullptr) continue;
    const GradTarget to = node->dtable ? node->dtable.target(tape) : GradTarget{{}, GradMode::overwrite};
    for (std::int64_t s = 0; s < shards; ++s) {
      const RowShards::Range shard = head.rows.range(s, vocab);
      const TensorView logits = logits_of(shard);
      const TensorView dlogits = narrow_buffer ? part_of(narrow_buffer, shard) : logits;
      kernels::cross_entropy_backward(stream, row_max, row_sum, target, first_row + shard.first, weight, logits,
                                      dlogits);
      if (wants_dh) {
        kernels::gemm(
            stream, Transpose::no, Transpose::no, 1.0, dlogits, table.view().row_range(shard.first, shard.rows),
            GradMode::overwrite,
            by_shard ? dh_buffer.view().row_range(s * count, count) : node->dh_value.view().row_range(first, count));
      }
      if (node->dtable) {
        kernels::gemm(stream, Transpose::yes, Transpose::no, 1.0, dlogits, x, to.mode,
                      to.view.row_range(shard.first, shard.rows));
      }
    }
    if (wants_dh && by_shard) {
      reducer.sum(stream, dh_buffer.view().row_range(0, shards * count), node->dh_value.view().row_range(first, count));
    }
  }
  return total;
}

}  // namespace

std::int64_t head_chunk_rows(Device device, std::int64_t rows, std::int64_t vocab) {
  // Pieces of about the same size: products of few rows are slow. Each piece reads and writes the whole gradient of the
  // table, which a device takes about as long for as for the product of 600 rows.
  const std::int64_t times = device == Device::cpu ? 1 : 4;
  const std::int64_t fit =
      std::clamp<std::int64_t>(times * (std::int64_t{1} << 25) / std::max<std::int64_t>(vocab, 1), 64, times * 1024);
  const std::int64_t pieces = std::max<std::int64_t>((rows + fit - 1) / fit, 1);
  const std::int64_t even = (rows + pieces - 1) / pieces;
  return std::clamp<std::int64_t>((even + 15) / 16 * 16, 1, std::max<std::int64_t>(rows, 1));
}

HeadLoss head_cross_entropy(Tape& tape, const Var& h, const Var& table, const Tensor& targets, std::int64_t first_row,
                            double weight, Reducer& reducer, const HeadShards& shards) {
  auto* node = tape.record<HeadCrossEntropyNode>(h, table);
  HeadLoss result;
  result.nll_sum = run_chunks(tape, h, table, targets, first_row, weight, reducer, shards, node, {});
  Tensor loss = tape.empty(Shape{1}, DType::f64);
  kernels::scale(tape.stream(), weight, std::as_const(result.nll_sum).view(), loss.view());
  result.loss = tape.output(std::move(loss), node);
  return result;
}

Tensor head_nll(Tape& tape, const Var& h, const Var& table, const Tensor& targets, std::int64_t first_row,
                Reducer& reducer, const HeadShards& shards) {
  Tensor nll = tape.empty(Shape{h.shape().rows()}, DType::f64);
  run_chunks(tape, h, table, targets, first_row, 1.0, reducer, shards, nullptr, nll);
  return nll;
}

Tensor head_logits(Tape& tape, const Var& h, const Var& table) {
  Tensor logits = tape.empty(Shape{h.shape().rows(), table.shape().rows()}, compute_dtype(h.dtype()));
  kernels::gemm(tape.stream(), Transpose::no, Transpose::yes, 1.0, h.view(), table.view(), GradMode::overwrite,
                logits.view());
  return logits;
}

}  // namespace tforge
