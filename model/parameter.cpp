#include "model/parameter.h"

#include <algorithm>

#include "core/errors.h"

namespace tforge {

ParameterSet::ParameterSet(Allocator& allocator, const std::vector<ParameterSpec>& specs, DType dtype, int tp_rank)
    : dtype_(dtype) {
  constexpr std::int64_t kAlignment = 16;
  const auto held = [&](const ParameterSpec& s) {
    return s.placement == Placement::replicated ? s.shape[0] : s.borders.count(tp_rank);
  };
  const auto row_elements = [](const ParameterSpec& s) { return s.shape.rank() == 1 ? 1 : s.shape.columns(); };
  const auto padded = [&](const ParameterSpec& s) {
    return (held(s) * row_elements(s) + kAlignment - 1) / kAlignment * kAlignment;
  };
  std::int64_t total = 0;
  for (const ParameterSpec& s : specs) total += padded(s);
  values_ = Tensor::zeros(allocator, Shape{total}, dtype, Purpose::weights);
  gradients_ = Tensor::zeros(allocator, Shape{total}, dtype, Purpose::gradients);

  std::int64_t offset = 0;
  for (const ParameterSpec& s : specs) {
    Parameter p;
    p.spec = s;
    p.rows = held(s);
    p.first_row = s.placement == Placement::replicated ? 0 : s.borders.begin(tp_rank);
    p.offset = offset;
    const std::int64_t elements = p.rows * row_elements(s);
    const Shape shape = s.shape.rank() == 1 ? Shape{p.rows} : Shape{p.rows, s.shape.columns()};
    p.gradient = gradients_.rows(offset, elements).reshaped(shape);
    p.var = Var::parameter(values_.rows(offset, elements).reshaped(shape), p.gradient, nullptr,
                           static_cast<int>(parameters_.size()));
    offset += padded(s);
    parameters_.push_back(std::move(p));
  }
}

std::vector<Bucket> ParameterSet::buckets(std::int64_t bytes, int ranks) const {
  std::vector<FlatBlock> blocks;
  for (const Parameter& p : parameters_) {
    blocks.push_back({p.offset, p.value().elements(), p.columns(), p.spec.bucketing});
  }
  const auto element = static_cast<std::int64_t>(size_of(dtype_));
  return make_buckets(blocks, gradients_.elements(), std::max<std::int64_t>(bytes / element, 1), ranks);
}

Parameter& ParameterSet::find(std::string_view path) {
  for (Parameter& p : parameters_) {
    if (p.path() == path) return p;
  }
  throw InternalError("the model has no parameter '{}'", path);
}

const Parameter& ParameterSet::find(std::string_view path) const { return const_cast<ParameterSet*>(this)->find(path); }

void ParameterSet::clear_gradients() {
  for (Parameter& p : parameters_) p.var.clear_grad();
}

void ParameterSet::finish_gradients() {
  for (Parameter& p : parameters_) {
    if (!p.var.grad().written()) p.gradient.fill_zero();
  }
}

}  // namespace tforge
