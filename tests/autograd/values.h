#pragma once
// Operands of autograd tests: f64 tensors of random or given numbers, and ops simple enough to check by hand.
#include <gtest/gtest.h>

#include <cstdint>
#include <limits>
#include <span>
#include <utility>
#include <vector>

#include "autograd/tape.h"
#include "autograd/var.h"
#include "core/rng.h"
#include "core/tensor.h"

namespace tforge::test {

using Values = std::vector<double>;

inline Tensor tensor(Allocator& allocator, const Shape& shape, const Values& values) {
  return Tensor::of<double>(allocator, shape, values, Purpose::activations);
}

inline Tensor vector(Allocator& allocator, const Values& values) {
  return tensor(allocator, Shape{static_cast<std::int64_t>(values.size())}, values);
}

inline Tensor integers(Allocator& allocator, const std::vector<std::int32_t>& values) {
  return Tensor::of<std::int32_t>(allocator, Shape{static_cast<std::int64_t>(values.size())}, values,
                                  Purpose::activations);
}

/// Normal numbers of the given size; each name is a stream of its own.
inline Tensor random(Allocator& allocator, const Shape& shape, const char* name, double size = 1) {
  Tensor t = Tensor::empty(allocator, shape, DType::f64, Purpose::activations);
  const Rng rng(7, name);
  std::uint64_t i = 0;
  for (double& v : t.span<double>()) v = size * rng.normal(i++);
  return t;
}

inline Values values_of(const Tensor& t) {
  const auto span = t.span<double>();
  return {span.begin(), span.end()};
}

inline Values values_of(ConstTensorView view) {
  const auto* first = view.as<double>();
  return {first, first + view.elements()};
}

/// A parameter and its gradient, which is born NaN so that what is not overwritten shows.
struct Parameter {
  Parameter(Allocator& allocator, const Values& values, GradHook* hook = nullptr, int id = 0)
      : gradient(vector(allocator, Values(values.size(), std::numeric_limits<double>::quiet_NaN()))),
        var(Var::parameter(vector(allocator, values), gradient, hook, id)) {}
  Values grad() const { return values_of(gradient); }
  Tensor gradient;
  Var var;
};

struct TimesNode final : Node {
  TimesNode(const Var& x, double factor_) : factor(factor_), dx(use(x)) {}
  void backward(Tape& tape) override {
    if (!dx) return;
    const GradTarget to = dx.target(tape);
    const auto* from = dy().read().as<double>();
    auto* out = to.view.as<double>();
    for (std::int64_t i = 0; i < to.view.elements(); ++i) {
      out[i] = factor * from[i] + (to.mode == GradMode::accumulate ? out[i] : 0);
    }
  }
  double factor;
  Grad dx;
};

/// factor * x; its backward writes to the target of x.
inline Var times(Tape& tape, const Var& x, double factor) {
  Tensor y = x.value().clone(tape.allocator());
  for (double& v : y.span<double>()) v *= factor;
  return tape.output(std::move(y), tape.record<TimesNode>(x, factor));
}

struct NegateNode final : Node {
  explicit NegateNode(const Var& x) : dx(use(x)) {}
  void backward(Tape& tape) override {
    if (!dx) return;
    Tensor gradient = dy().take(tape);
    for (double& v : gradient.span<double>()) v = -v;
    dx.adopt(tape, std::move(gradient));
  }
  Grad dx;
};

/// -x; its backward takes the gradient and changes it in place.
inline Var negate(Tape& tape, const Var& x) {
  Tensor y = x.value().clone(tape.allocator());
  for (double& v : y.span<double>()) v = -v;
  return tape.output(std::move(y), tape.record<NegateNode>(x));
}

struct WeightedSumNode final : Node {
  WeightedSumNode(const Var& x, Values weights_) : weights(std::move(weights_)), dx(use(x)) {}
  void backward(Tape& tape) override {
    if (dx) dx.adopt(tape, vector(tape.allocator(), weights));
  }
  Values weights;
  Grad dx;
};

/// sum_i w_i x_i: a loss whose gradient is w.
inline Var weighted_sum(Tape& tape, const Var& x, const Values& w) {
  double sum = 0;
  const Values values = values_of(x.value());
  for (std::size_t i = 0; i < values.size(); ++i) sum += w[i] * values[i];
  return tape.output(vector(tape.allocator(), {sum}), tape.record<WeightedSumNode>(x, w));
}

}  // namespace tforge::test
