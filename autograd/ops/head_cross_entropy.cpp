#include "autograd/ops/head_cross_entropy.h"

#include <algorithm>

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
    double incoming = 0;
    with_compute_type("head_cross_entropy", dy().read().dtype,
                      [&](auto zero) { incoming = static_cast<double>(*dy().read().as<decltype(zero)>()); });
    if (incoming != 1) throw InternalError("head_cross_entropy: the loss is not the root of the backward pass");
    if (dh) dh.adopt(tape, std::move(dh_value));
  }
  Grad dh, dtable;
  Tensor dh_value;
};

/// Runs over the chunks; `node` null means forward only. nll [T] f64 is filled when given.
double run_chunks(Tape& tape, const Var& h, const Var& table, const Tensor& targets, std::int64_t first_row,
                  double weight, Reducer& reducer, HeadCrossEntropyNode* node, TensorView nll_out) {
  Stream& stream = tape.stream();
  const std::int64_t rows = h.shape().rows(), vocab = table.shape().rows();
  if (targets.elements() != rows) {
    throw ShapeError("head_cross_entropy: {} targets for {} rows", targets.elements(), rows);
  }
  const std::int64_t step = head_chunk_rows(rows, vocab);
  Tensor logits_buffer = tape.empty(Shape{step, vocab}, h.dtype());
  Tensor max_buffer = tape.empty(Shape{step, 1}, h.dtype(), Purpose::communication);
  Tensor sum_buffer = tape.empty(Shape{step, 2}, h.dtype(), Purpose::communication);
  Tensor nll_buffer = tape.empty(Shape{step}, DType::f64);
  if (node != nullptr && node->dh) node->dh_value = tape.empty(h.shape(), h.dtype());
  double total = 0;
  for (std::int64_t first = 0; first < rows; first += step) {
    const std::int64_t count = std::min(step, rows - first);
    const ConstTensorView x = h.view().row_range(first, count);
    const Tensor chunk_targets = targets.reshaped(Shape{rows}).rows(first, count);
    const ConstTensorView target = chunk_targets.view();
    const TensorView logits = logits_buffer.view().row_range(0, count);
    const TensorView row_max = max_buffer.view().row_range(0, count);
    const TensorView sums = sum_buffer.view().row_range(0, count);
    const TensorView row_sum = sums.column_range(0, 1), target_logit = sums.column_range(1, 1);
    Tensor nll = nll_buffer.rows(0, count);

    kernels::gemm(stream, Transpose::no, Transpose::yes, 1.0, x, table.view(), GradMode::overwrite, logits);
    kernels::cross_entropy_row_max(stream, logits, row_max);
    reducer.max(stream, row_max);
    kernels::cross_entropy_row_sum(stream, logits, row_max, target, first_row, row_sum, target_logit);
    reducer.sum(stream, sums);
    kernels::cross_entropy_nll(stream, row_sum, target_logit, target, nll.view());
    for (const double value : nll.span<double>()) total += value;
    if (nll_out) std::ranges::copy(nll.span<double>(), nll_out.as<double>() + first);

    if (node == nullptr) continue;
    kernels::cross_entropy_backward(stream, row_max, row_sum, target, first_row, weight, logits);
    if (node->dh) {
      kernels::gemm(stream, Transpose::no, Transpose::no, 1.0, logits, table.view(), GradMode::overwrite,
                    node->dh_value.view().row_range(first, count));
    }
    if (node->dtable) {
      const GradTarget to = node->dtable.target(tape);
      kernels::gemm(stream, Transpose::yes, Transpose::no, 1.0, logits, x, to.mode, to.view);
    }
  }
  return total;
}

}  // namespace

std::int64_t head_chunk_rows(std::int64_t rows, std::int64_t vocab) {
  const std::int64_t fit = (std::int64_t{1} << 24) / std::max<std::int64_t>(vocab, 1) / 64 * 64;
  return std::min(std::clamp<std::int64_t>(fit, 64, 1024), std::max<std::int64_t>(rows, 1));
}

HeadLoss head_cross_entropy(Tape& tape, const Var& h, const Var& table, const Tensor& targets, std::int64_t first_row,
                            double weight, Reducer& reducer) {
  auto* node = tape.record<HeadCrossEntropyNode>(h, table);
  HeadLoss result;
  result.nll_sum = run_chunks(tape, h, table, targets, first_row, weight, reducer, node, {});
  Tensor loss = tape.empty(Shape{1}, h.dtype());
  kernels::fill(tape.stream(), loss.view(), weight * result.nll_sum);
  result.loss = tape.output(std::move(loss), node);
  return result;
}

Tensor head_nll(Tape& tape, const Var& h, const Var& table, const Tensor& targets, std::int64_t first_row,
                Reducer& reducer) {
  Tensor nll = tape.empty(Shape{h.shape().rows()}, DType::f64);
  run_chunks(tape, h, table, targets, first_row, 1.0, reducer, nullptr, nll.view());
  return nll;
}

Tensor head_logits(Tape& tape, const Var& h, const Var& table) {
  Tensor logits = tape.empty(Shape{h.shape().rows(), table.shape().rows()}, h.dtype());
  kernels::gemm(tape.stream(), Transpose::no, Transpose::yes, 1.0, h.view(), table.view(), GradMode::overwrite,
                logits.view());
  return logits;
}

}  // namespace tforge
