#include "parallel/grad_sync.h"

#include <algorithm>
#include <cmath>
#include <numeric>
#include <utility>

#include "core/copy.h"
#include "core/errors.h"
#include "kernels/embedding.h"

namespace tforge {

GradSync::GradSync(Communicator& dp, Tensor flat, std::vector<Bucket> buckets, Reduction reduction, Sums sums)
    : dp_(dp), flat_(std::move(flat)), buckets_(std::move(buckets)), reduction_(reduction), sums_(sums) {
  std::size_t parameters = 0;
  for (const Bucket& b : buckets_) parameters += static_cast<std::size_t>(b.parameters);
  bucket_of_.resize(parameters);
  for (std::size_t i = 0; i < buckets_.size(); ++i) {
    const auto first = static_cast<std::size_t>(buckets_[i].first_parameter);
    std::fill_n(bucket_of_.begin() + static_cast<std::ptrdiff_t>(first), buckets_[i].parameters, i);
  }
  missing_.resize(buckets_.size());
}

void GradSync::begin(Stream& stream) {
  if (dp_.size() == 1 || reduction_ == Reduction::blocking) return;
  stream_ = &stream;
  started_ = 0;
  for (std::size_t i = 0; i < buckets_.size(); ++i) missing_[i] = buckets_[i].parameters;
}

void GradSync::gradient_ready(int parameter_id) {
  if (stream_ == nullptr) return;
  const std::size_t bucket = bucket_of_[static_cast<std::size_t>(parameter_id)];
  if (--missing_[bucket] < 0) throw InternalError("the gradient of parameter {} was final twice", parameter_id);
  start_ready(*stream_);
}

void GradSync::node_done() {
  if (stream_ != nullptr && reduction_ == Reduction::polled) dp_.progress();
}

void GradSync::start_ready(Stream& stream) {
  while (started_ < buckets_.size() && missing_[started_] == 0) {
    const Bucket& b = buckets_[started_++];
    if (sums_ == Sums::everywhere) {
      dp_.start_reduce(stream, flat_.rows(b.begin(), b.elements()).view(), Communicator::kEveryRank);
      continue;
    }
    for (int r = 0; r < dp_.size(); ++r) {
      dp_.start_reduce(stream, flat_.rows(b.begin(r), b.elements(r)).view(), r);
    }
  }
}

void GradSync::finish(Stream& stream) {
  if (dp_.size() == 1) return;
  if (stream_ == nullptr && sums_ == Sums::everywhere) {
    dp_.all_reduce(stream, flat_.view(), ReduceOp::sum);
    return;
  }
  if (stream_ == nullptr) {
    for (const Bucket& b : buckets_) {
      set_counts(b);
      Tensor own = flat_.rows(b.begin(dp_.rank()), b.elements(dp_.rank()));
      dp_.reduce_scatter(stream, flat_.rows(b.begin(), b.elements()).view(), own.view(), counts_);
    }
    return;
  }
  std::ranges::fill(missing_, 0);
  start_ready(stream);
  stream_ = nullptr;
  dp_.finish();
}

void GradSync::gather(Stream& stream, const Tensor& values) {
  if (dp_.size() == 1 || sums_ == Sums::everywhere) return;
  for (const Bucket& b : buckets_) {
    set_counts(b);
    const Tensor own = values.rows(b.begin(dp_.rank()), b.elements(dp_.rank()));
    dp_.all_gather(stream, own.view(), values.rows(b.begin(), b.elements()).view(), counts_);
  }
}

void GradSync::set_counts(const Bucket& bucket) {
  counts_.resize(static_cast<std::size_t>(dp_.size()));
  for (int r = 0; r < dp_.size(); ++r) counts_[static_cast<std::size_t>(r)] = bucket.elements(r);
}

LookupSync::LookupSync(Allocator& allocator, Communicator& dp, std::vector<std::int64_t> rows, std::int64_t columns,
                       DType dtype)
    : allocator_(allocator), dp_(dp), rows_(std::move(rows)) {
  for (const std::int64_t n : rows_) elements_.push_back(n * columns);
  const auto own = rows_.begin() + dp.rank();
  const std::int64_t all = std::accumulate(rows_.begin(), rows_.end(), std::int64_t{0});
  const std::int64_t before = std::accumulate(rows_.begin(), own, std::int64_t{0});
  tokens_ = Tensor::empty(allocator, Shape{all}, DType::i32, Purpose::communication);
  gradients_ = Tensor::empty(allocator, Shape{all, columns}, dtype, Purpose::communication);
  own_tokens_ = tokens_.rows(before, *own);
  own_gradients_ = gradients_.rows(before, *own);
  leaf_ = Var::parameter(own_gradients_, own_gradients_, nullptr, -1);
}

Var LookupSync::leaf(const Tensor& h, const Tensor& tokens) {
  if (!(h.shape() == own_gradients_.shape()) || tokens.elements() != own_tokens_.elements()) {
    throw ShapeError("a lookup of shape {} where {} is expected", h.shape().text(), own_gradients_.shape().text());
  }
  own_tokens_.assign(tokens.reshaped(own_tokens_.shape()));
  leaf_.clear_grad();
  Var leaf = leaf_;
  leaf.value() = h;
  return leaf;
}

void LookupSync::finish(Stream& stream, std::int64_t first_row, TensorView dtable) {
  if (!leaf_.grad().written()) own_gradients_.fill_zero();
  dp_.all_gather(stream, std::as_const(own_tokens_).view(), tokens_.view(), rows_);
  dp_.all_gather(stream, std::as_const(own_gradients_).view(), gradients_.view(), elements_);
  Tensor workspace = Tensor::empty(allocator_, Shape{kernels::embedding_workspace(tokens_.elements(), dtable.rows())},
                                   DType::i32, Purpose::workspace);
  kernels::embedding_backward(stream, std::as_const(tokens_).view(), std::as_const(gradients_).view(), first_row,
                              GradMode::accumulate, dtable, workspace.view());
}

std::int64_t LookupSync::bytes(std::int64_t rows, std::int64_t columns, DType dtype) {
  return rows * (columns * static_cast<std::int64_t>(size_of(dtype)) + static_cast<std::int64_t>(size_of(DType::i32)));
}

bool LookupSync::pays(std::int64_t rows, std::int64_t table_rows, std::int64_t columns, DType dtype) {
  const auto sum = table_rows * columns * static_cast<std::int64_t>(size_of(compute_dtype(dtype)));
  return bytes(rows, columns, dtype) < 2 * sum;
}

double global_norm(Stream& stream, Communicator& tp, double sharded_squares, double replicated_squares) {
  // Rank 0's replicated squares count, since the ranks may have added the same numbers in another order.
  const bool counts = tp.rank() == 0 || !std::isfinite(replicated_squares);
  double squares = sharded_squares + (counts ? replicated_squares : 0);
  tp.all_reduce(stream, TensorView{&squares, DType::f64, Device::cpu, Shape{1}, 1}, ReduceOp::sum);
  return std::sqrt(squares);
}

}  // namespace tforge
