#include "autograd/ops/linear.h"

#include <array>
#include <utility>

#include "core/errors.h"
#include "kernels/elementwise.h"
#include "kernels/gelu.h"
#include "kernels/gemm.h"

namespace tforge {

namespace {

using kernels::gemm;
using kernels::Transpose;

ConstTensorView view(const Tensor& t) { return t ? t.view() : ConstTensorView{}; }

/// y = x W^T + b
void forward(Stream& stream, const ConstTensorView& x, const ConstTensorView& weight, const ConstTensorView& bias,
             const TensorView& y) {
  gemm(stream, Transpose::no, Transpose::yes, 1.0, x, weight, GradMode::overwrite, y);
  if (bias) kernels::add_row(stream, bias, y);
}

/// dW {=, +=} dy^T x, db {=, +=} the sum of dy's rows.
void weight_gradients(Tape& tape, const ConstTensorView& x, const ConstTensorView& dy, Grad& dweight, Grad& dbias) {
  if (dweight) {
    const GradTarget to = dweight.target(tape);
    gemm(tape.stream(), Transpose::yes, Transpose::no, 1.0, dy, x, to.mode, to.view);
  }
  if (dbias) {
    const GradTarget to = dbias.target(tape);
    kernels::column_sums(tape.stream(), dy, to.mode, to.view);
  }
}

struct LinearNode final : Node {
  struct Layer {
    Tensor weight;
    Grad dweight, dbias;
  };

  LinearNode(Tape& tape, const Var& input, std::span<const LinearWeights> weights)
      : x(tape, input.value()), dx(use(input)), count(weights.size()) {
    for (std::size_t g = 0; g < count; ++g) {
      layers[g] = {weights[g].weight.value(), use(weights[g].weight), use(weights[g].bias)};
    }
  }

  void backward(Tape& tape) override {
    const Tensor input = x.load(tape);
    const ConstTensorView all = dy().read();
    std::int64_t first = 0;
    for (std::size_t g = 0; g < count; ++g) {
      Layer& l = layers[g];
      const ConstTensorView mine = all.column_range(first, l.weight.shape().rows());
      first += l.weight.shape().rows();
      if (dx) {
        const GradTarget to = dx.target(tape);
        gemm(tape.stream(), Transpose::no, Transpose::no, 1.0, mine, view(l.weight), to.mode, to.view);
      }
      weight_gradients(tape, view(input), mine, l.dweight, l.dbias);
    }
  }

  Saved x;
  Grad dx;
  std::size_t count;
  std::array<Layer, kMaxLinearGroup> layers;
};

struct LinearOfShardNode final : Node {
  LinearOfShardNode(Tape& tape, const Var& input, const Var& weight_)
      : x(tape, input.value()), weight(weight_.value()), dx(use(input)), dweight(use(weight_)) {}

  void backward(Tape& tape) override {
    if (dx) {
      const GradTarget to = dx.target(tape);
      gemm(tape.stream(), Transpose::no, Transpose::yes, 1.0, dy().read(), view(weight), to.mode, to.view);
    }
    if (dweight) {
      const Tensor input = x.load(tape);
      const GradTarget to = dweight.target(tape);
      gemm(tape.stream(), Transpose::yes, Transpose::no, 1.0, view(input), dy().read(), to.mode, to.view);
    }
  }

  Saved x;
  Tensor weight;
  Grad dx, dweight;
};

struct GeluMlpNode final : Node {
  GeluMlpNode(Tape& tape, const Var& input, const LinearWeights& in, const Var& second, Saved scores_)
      : x(tape, input.value()),
        scores(std::move(scores_)),
        weight(in.weight.value()),
        bias(in.bias.value()),
        out(second.value()),
        dx(use(input)),
        dweight(use(in.weight)),
        dbias(use(in.bias)),
        dout(use(second)),
        recompute(tape.saves().recompute == Recompute::scores) {}

  Tensor take_scores(Tape& tape, const Tensor& input) {
    if (!recompute) return std::exchange(scores, Saved()).load(tape);
    Tensor again = tape.empty(Shape{input.shape().rows(), weight.shape().rows()}, input.dtype());
    forward(tape.stream(), view(input), view(weight), view(bias), again.view());
    return again;
  }

  void backward(Tape& tape) override {
    Stream& stream = tape.stream();
    const Tensor input = x.load(tape);
    const Tensor a = take_scores(tape, input);
    Tensor buffer = tape.empty(a.shape(), a.dtype());  // P, then the gradients of P and of the scores
    if (dout) {
      kernels::gelu_forward(stream, a.view(), buffer.view());
      const GradTarget to = dout.target(tape);
      gemm(stream, Transpose::yes, Transpose::no, 1.0, view(buffer), dy().read(), to.mode, to.view);
    }
    gemm(stream, Transpose::no, Transpose::yes, 1.0, dy().read(), view(out), GradMode::overwrite, buffer.view());
    kernels::gelu_backward(stream, a.view(), view(buffer), GradMode::overwrite, buffer.view());
    if (dx) {
      const GradTarget to = dx.target(tape);
      gemm(stream, Transpose::no, Transpose::no, 1.0, view(buffer), view(weight), to.mode, to.view);
    }
    weight_gradients(tape, view(input), view(buffer), dweight, dbias);
  }

  Saved x, scores;
  Tensor weight, bias, out;
  Grad dx, dweight, dbias, dout;
  bool recompute;  // scores
};

struct AddBiasNode final : Node {
  AddBiasNode(const Var& y, const Var& bias) : dy_in(use(y)), dbias(use(bias)) {}
  void backward(Tape& tape) override {
    if (dbias) {
      const GradTarget to = dbias.target(tape);
      kernels::column_sums(tape.stream(), dy().read(), to.mode, to.view);
    }
    if (dy_in) dy_in.adopt(tape, dy().share());
  }
  Grad dy_in, dbias;
};

}  // namespace

Var linear(Tape& tape, const Var& x, std::span<const LinearWeights> layers) {
  if (layers.empty() || layers.size() > kMaxLinearGroup) {
    throw ShapeError("linear: {} layers in a group, want 1 to {}", layers.size(), kMaxLinearGroup);
  }
  std::int64_t columns = 0;
  for (const LinearWeights& l : layers) columns += l.weight.shape().rows();
  Tensor y = tape.empty(Shape{x.shape().rows(), columns}, x.dtype());
  std::int64_t first = 0;
  for (const LinearWeights& l : layers) {
    const std::int64_t n = l.weight.shape().rows();
    forward(tape.stream(), x.view(), l.weight.view(), l.bias ? l.bias.view() : ConstTensorView{},
            y.view().column_range(first, n));
    first += n;
  }
  return tape.output(std::move(y), tape.record<LinearNode>(tape, x, layers));
}

Var linear_of_shard(Tape& tape, const Var& x, const Var& weight) {
  Tensor y = tape.empty(Shape{x.shape().rows(), weight.shape().columns()}, x.dtype());
  gemm(tape.stream(), Transpose::no, Transpose::no, 1.0, x.view(), weight.view(), GradMode::overwrite, y.view());
  return tape.output(std::move(y), tape.record<LinearOfShardNode>(tape, x, weight));
}

Var gelu_mlp(Tape& tape, const Var& x, const LinearWeights& in, const Var& out) {
  Stream& stream = tape.stream();
  const Shape wide{x.shape().rows(), in.weight.shape().rows()};
  Tensor a = tape.empty(wide, x.dtype());
  forward(stream, x.view(), in.weight.view(), in.bias ? in.bias.view() : ConstTensorView{}, a.view());
  Saved scores;
  if (tape.recording() && tape.saves().recompute != Recompute::scores) scores = Saved(tape, a);
  Tensor p = a.unique() ? a : tape.empty(wide, x.dtype());  // unless the scores wait for backward as they are
  kernels::gelu_forward(stream, view(a), p.view());
  a = Tensor();
  Tensor y = tape.empty(Shape{x.shape().rows(), out.shape().columns()}, x.dtype());
  gemm(stream, Transpose::no, Transpose::no, 1.0, view(p), out.view(), GradMode::overwrite, y.view());
  return tape.output(std::move(y), tape.record<GeluMlpNode>(tape, x, in, out, std::move(scores)));
}

Var add_bias(Tape& tape, Var y, const Var& bias) {
  Node* node = tape.record<AddBiasNode>(y, bias);
  Tensor sum = y.value().unique() ? std::move(y.value()) : y.value().clone(tape.allocator());
  kernels::add_row(tape.stream(), bias.view(), sum.view());
  return tape.output(std::move(sum), node);
}

}  // namespace tforge
