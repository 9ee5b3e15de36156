#include "autograd/ops/linear.h"

#include <array>
#include <utility>

#include "autograd/shard_parts.h"
#include "core/errors.h"
#include "kernels/elementwise.h"
#include "kernels/gelu.h"
#include "kernels/gemm.h"

namespace tforge {

namespace {

using kernels::gemm;
using kernels::Transpose;

ConstTensorView view(const Tensor& t) { return t ? t.view() : ConstTensorView{}; }

/// Calls f(s, first, rows) for each shard of the `rows_here` rows.
template <class F>
void for_each_shard(const RowShards& shards, std::int64_t rows_here, F&& f) {
  for (std::int64_t s = 0; s < shards.count(); ++s) {
    const RowShards::Range range = shards.range(s, rows_here);
    f(s, range.first, range.rows);
  }
}

/// y = x W^T + b, shard by shard.
void forward(Stream& stream, const ConstTensorView& x, const ConstTensorView& weight, const ConstTensorView& bias,
             const RowShards& shards, const TensorView& y) {
  for_each_shard(shards, weight.rows(), [&](std::int64_t, std::int64_t first, std::int64_t rows) {
    gemm(stream, Transpose::no, Transpose::yes, 1.0, x, weight.row_range(first, rows), GradMode::overwrite,
         y.column_range(first, rows));
  });
  if (bias) kernels::add_row(stream, bias, y);
}

/// y = sum over the shards of x[:, rows of the shard] W[rows of the shard, :].
Tensor product_of_shards(Tape& tape, const ConstTensorView& x, const ConstTensorView& weight, const RowShards& shards,
                         Reducer& reducer) {
  ShardParts parts(tape, reducer, shards.count(), Shape{x.rows(), weight.columns()}, x.dtype);
  for_each_shard(shards, weight.rows(), [&](std::int64_t s, std::int64_t first, std::int64_t rows) {
    gemm(tape.stream(), Transpose::no, Transpose::no, 1.0, x.column_range(first, rows), weight.row_range(first, rows),
         GradMode::overwrite, parts.part(s));
  });
  return parts.total();
}

/// dx = dy W^T, shard by shard, which are columns of dx.
void gradient_of_columns(Stream& stream, const ConstTensorView& dy, const ConstTensorView& weight,
                         const RowShards& shards, GradMode mode, const TensorView& dx) {
  for_each_shard(shards, weight.rows(), [&](std::int64_t, std::int64_t first, std::int64_t rows) {
    gemm(stream, Transpose::no, Transpose::yes, 1.0, dy, weight.row_range(first, rows), mode,
         dx.column_range(first, rows));
  });
}

/// dW {=, +=} left^T right, shard by shard: columns of `left` are rows of dW.
void weight_gradient(Tape& tape, const ConstTensorView& left, const ConstTensorView& right, const RowShards& shards,
                     Grad& dweight) {
  if (!dweight) return;
  const GradTarget to = dweight.target(tape);
  for_each_shard(shards, to.view.rows(), [&](std::int64_t, std::int64_t first, std::int64_t rows) {
    gemm(tape.stream(), Transpose::yes, Transpose::no, 1.0, left.column_range(first, rows), right, to.mode,
         to.view.row_range(first, rows));
  });
}

/// db {=, +=} the sum of dy's rows.
void bias_gradient(Tape& tape, const ConstTensorView& dy, Grad& dbias) {
  if (!dbias) return;
  const GradTarget to = dbias.target(tape);
  kernels::column_sums(tape.stream(), dy, to.mode, to.view);
}

struct LinearNode final : Node {
  struct Layer {
    Tensor weight;
    RowShards shards;
    Grad dweight, dbias;
  };

  LinearNode(Tape& tape, const Var& input, std::span<const LinearWeights> weights, Reducer& reducer_)
      : reducer(reducer_), x(tape, input.value()), dx(use(input)), count(weights.size()) {
    for (std::size_t g = 0; g < count; ++g) {
      layers[g] = {weights[g].weight.value(), weights[g].shards, use(weights[g].weight), use(weights[g].bias)};
    }
  }

  void backward(Tape& tape) override {
    const Tensor input = x.load(tape);
    const ConstTensorView all = dy().read();
    std::array<ConstTensorView, kMaxLinearGroup> mine;
    std::int64_t first = 0;
    for (std::size_t g = 0; g < count; ++g) {
      const std::int64_t n = layers[g].weight.shape().rows();
      mine[g] = all.column_range(first, n);
      first += n;
      weight_gradient(tape, mine[g], view(input), layers[g].shards, layers[g].dweight);
      bias_gradient(tape, mine[g], layers[g].dbias);
    }
    add_input_gradient(
        tape, dx, reducer, layers[0].shards.count(), input.shape(), input.dtype(), [&](std::int64_t s, GradTarget to) {
          for (std::size_t g = 0; g < count; ++g) {
            const ConstTensorView weight = view(layers[g].weight);
            const RowShards::Range shard = layers[g].shards.range(s, weight.rows());
            gemm(tape.stream(), Transpose::no, Transpose::no, 1.0, mine[g].column_range(shard.first, shard.rows),
                 weight.row_range(shard.first, shard.rows), g == 0 ? to.mode : GradMode::accumulate, to.view);
          }
        });
  }

  Reducer& reducer;
  Saved x;
  Grad dx;
  std::size_t count;
  std::array<Layer, kMaxLinearGroup> layers;
};

struct LinearOfShardNode final : Node {
  LinearOfShardNode(Tape& tape, const Var& input, const Var& weight_, RowShards shards_)
      : shards(shards_), x(tape, input.value()), weight(weight_.value()), dx(use(input)), dweight(use(weight_)) {}

  void backward(Tape& tape) override {
    if (dx) {
      const GradTarget to = dx.target(tape);
      gradient_of_columns(tape.stream(), dy().read(), view(weight), shards, to.mode, to.view);
    }
    if (dweight) weight_gradient(tape, view(x.load(tape)), dy().read(), shards, dweight);
  }

  RowShards shards;
  Saved x;
  Tensor weight;
  Grad dx, dweight;
};

struct GeluMlpNode final : Node {
  GeluMlpNode(Tape& tape, const Var& input, const LinearWeights& in, const Var& second, Saved scores_,
              Reducer& reducer_)
      : reducer(reducer_),
        shards(in.shards),
        x(tape, input.value()),
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
    forward(tape.stream(), view(input), view(weight), view(bias), shards, again.view());
    return again;
  }

  void backward(Tape& tape) override {
    Stream& stream = tape.stream();
    const Tensor input = x.load(tape);
    const Tensor a = take_scores(tape, input);
    Tensor buffer = tape.empty(a.shape(), a.dtype());  // P, then the gradients of P and of the scores
    if (dout) {
      kernels::gelu_forward(stream, view(a), buffer.view());
      weight_gradient(tape, view(buffer), dy().read(), shards, dout);
    }
    gradient_of_columns(stream, dy().read(), view(out), shards, GradMode::overwrite, buffer.view());
    kernels::gelu_backward(stream, view(a), view(buffer), GradMode::overwrite, buffer.view());
    weight_gradient(tape, view(buffer), view(input), shards, dweight);
    bias_gradient(tape, view(buffer), dbias);
    add_input_gradient(
        tape, dx, reducer, shards.count(), input.shape(), input.dtype(), [&](std::int64_t s, GradTarget to) {
          const RowShards::Range shard = shards.range(s, weight.shape().rows());
          gemm(stream, Transpose::no, Transpose::no, 1.0, view(buffer).column_range(shard.first, shard.rows),
               view(weight).row_range(shard.first, shard.rows), to.mode, to.view);
        });
  }

  Reducer& reducer;
  RowShards shards;
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

Var linear(Tape& tape, const Var& x, std::span<const LinearWeights> layers, Reducer& reducer) {
  if (layers.empty() || layers.size() > kMaxLinearGroup) {
    throw ShapeError("linear: {} layers in a group, want 1 to {}", layers.size(), kMaxLinearGroup);
  }
  std::int64_t columns = 0;
  for (const LinearWeights& l : layers) {
    columns += l.weight.shape().rows();
    if (l.shards.count() != layers[0].shards.count()) {
      throw ShapeError("linear: {} and {} shards of layers in a group", layers[0].shards.count(), l.shards.count());
    }
  }
  Tensor y = tape.empty(Shape{x.shape().rows(), columns}, x.dtype());
  std::int64_t first = 0;
  for (const LinearWeights& l : layers) {
    const std::int64_t n = l.weight.shape().rows();
    forward(tape.stream(), x.view(), l.weight.view(), l.bias ? l.bias.view() : ConstTensorView{}, l.shards,
            y.view().column_range(first, n));
    first += n;
  }
  return tape.output(std::move(y), tape.record<LinearNode>(tape, x, layers, reducer));
}

Var linear_of_shard(Tape& tape, const Var& x, const Var& weight, Reducer& reducer, RowShards shards) {
  Tensor y = product_of_shards(tape, x.view(), weight.view(), shards, reducer);
  return tape.output(std::move(y), tape.record<LinearOfShardNode>(tape, x, weight, shards));
}

Var gelu_mlp(Tape& tape, const Var& x, const LinearWeights& in, const Var& out, Reducer& reducer) {
  Stream& stream = tape.stream();
  const Shape wide{x.shape().rows(), in.weight.shape().rows()};
  Tensor a = tape.empty(wide, x.dtype());
  forward(stream, x.view(), in.weight.view(), in.bias ? in.bias.view() : ConstTensorView{}, in.shards, a.view());
  Saved scores;
  if (tape.recording() && tape.saves().recompute != Recompute::scores) scores = Saved(tape, a);
  Tensor p = a.unique() ? a : tape.empty(wide, x.dtype());  // unless the scores wait for backward as they are
  kernels::gelu_forward(stream, view(a), p.view());
  a = Tensor();
  Tensor y = product_of_shards(tape, view(p), out.view(), in.shards, reducer);
  return tape.output(std::move(y), tape.record<GeluMlpNode>(tape, x, in, out, std::move(scores), reducer));
}

Var add_bias(Tape& tape, Var y, const Var& bias) {
  Node* node = tape.record<AddBiasNode>(y, bias);
  Tensor sum = y.value().unique() ? std::move(y.value()) : y.value().clone(tape.allocator());
  kernels::add_row(tape.stream(), bias.view(), sum.view());
  return tape.output(std::move(sum), node);
}

}  // namespace tforge
