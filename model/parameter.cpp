#include "model/parameter.h"

#include <algorithm>
#include <utility>

#include "core/errors.h"
#include "kernels/elementwise.h"
#include "parallel/communicator.h"

namespace tforge {

namespace {

std::int64_t rows_held(const ParameterSpec& s, int tp_rank) {
  return s.placement == Placement::replicated ? s.shape[0] : s.borders.count(tp_rank);
}

}  // namespace

FlatLayout flat_layout(const std::vector<ParameterSpec>& specs, int tp_rank) {
  constexpr std::int64_t kAlignment = 16;
  FlatLayout layout;
  for (const ParameterSpec& s : specs) {
    const std::int64_t rows = s.shape.rank() == 1 ? 1 : rows_held(s, tp_rank), elements = rows * s.shape.columns();
    layout.blocks.push_back({layout.elements, elements, s.shape.columns(), s.bucketing});
    layout.elements += (elements + kAlignment - 1) / kAlignment * kAlignment;
  }
  return layout;
}

std::vector<Bucket> FlatLayout::buckets(DType dtype, std::int64_t bytes, int ranks) const {
  const auto element = static_cast<std::int64_t>(size_of(dtype));
  return make_buckets(blocks, elements, std::max<std::int64_t>(bytes / element, 1), ranks);
}

ParameterSet::ParameterSet(Allocator& allocator, const std::vector<ParameterSpec>& specs, DType dtype, int tp_rank)
    : layout_(flat_layout(specs, tp_rank)) {
  const DType stored = compute_dtype(dtype);
  values_ = Tensor::zeros(allocator, Shape{layout_.elements}, stored, Purpose::weights);
  gradients_ = Tensor::zeros(allocator, Shape{layout_.elements}, stored, Purpose::gradients);
  if (dtype != stored) copies_ = Tensor::zeros(allocator, Shape{layout_.elements}, dtype, Purpose::weights);
  for (const ParameterSpec& s : specs) {
    const FlatBlock& block = layout_.blocks[parameters_.size()];
    Parameter p;
    p.spec = s;
    p.rows = rows_held(s, tp_rank);
    p.first_row = s.placement == Placement::replicated ? 0 : s.borders.begin(tp_rank);
    p.offset = block.offset;
    const Shape shape = s.shape.rank() == 1 ? Shape{p.rows} : Shape{p.rows, s.shape.columns()};
    const auto part = [&](const Tensor& flat) { return flat.rows(block.offset, block.elements).reshaped(shape); };
    p.stored = part(values_);
    p.gradient = part(gradients_);
    p.var = Var::parameter(copies_ && p.columns() > 1 ? part(copies_) : p.stored, p.gradient, this,
                           static_cast<int>(parameters_.size()));
    parameters_.push_back(std::move(p));
  }
}

void ParameterSet::round(Stream& stream) {
  if (copies_) kernels::convert(stream, std::as_const(values_).view(), copies_.view());
}

std::vector<RowRange> ParameterSet::owned_rows(const std::vector<Bucket>& buckets, int dp_rank) const {
  std::vector<RowRange> owned(parameters_.size());
  for (const Bucket& bucket : buckets) {
    for (int k = 0; k < bucket.parameters; ++k) {
      const auto i = static_cast<std::size_t>(bucket.first_parameter) + static_cast<std::size_t>(k);
      const Parameter& p = parameters_[i];
      const FlatBlock& block = layout_.blocks[i];
      const std::int64_t begin = std::clamp<std::int64_t>(bucket.begin(dp_rank) - block.offset, 0, block.elements);
      const std::int64_t end = std::clamp<std::int64_t>(bucket.end(dp_rank) - block.offset, 0, block.elements);
      owned[i] = {begin / p.columns(), (end - begin) / p.columns()};
    }
  }
  return owned;
}

Parameter& ParameterSet::find(std::string_view path) {
  for (Parameter& p : parameters_) {
    if (p.path() == path) return p;
  }
  throw InternalError("the model has no parameter '{}'", path);
}

const Parameter& ParameterSet::find(std::string_view path) const { return const_cast<ParameterSet*>(this)->find(path); }

void ParameterSet::clear_gradients() {
  for (Parameter& p : parameters_) {
    p.var.clear_grad();
    p.zeroed = false;
  }
}

void ParameterSet::gradient_ready(int parameter_id) {
  Parameter& p = parameters_[static_cast<std::size_t>(parameter_id)];
  if (!p.var.grad().written()) {
    p.gradient.fill_zero();
    p.zeroed = true;
  }
  set_place(p.path());
  if (hook_ != nullptr) hook_->gradient_ready(parameter_id);
}

void ParameterSet::finish_gradients() {
  for (Parameter& p : parameters_) {
    if (!p.var.grad().written() && !p.zeroed) p.gradient.fill_zero();
  }
}

}  // namespace tforge
