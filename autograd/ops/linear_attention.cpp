#include "autograd/ops/linear_attention.h"

#include <utility>

#include "core/errors.h"

namespace tforge {

namespace {

using kernels::LinearPass;
using kernels::LinearShape;

Tensor workspace_for(Tape& tape, const LinearShape& shape, const AttentionFeatures& features, std::int64_t c,
                     LinearPass pass, DType dtype) {
  const std::int64_t size =
      kernels::linear_attention_workspace(shape, c / shape.heads, features.count, pass, tape.stream().device());
  return tape.empty(Shape{size}, compute_dtype(dtype), Purpose::workspace);
}

struct LinearAttentionNode final : Node {
  LinearAttentionNode(Tape& tape, const Var& input, const Tensor& result, Tensor den_, const LinearShape& shape_,
                      AttentionFeatures features_)
      : qkv(tape, input.value()),
        out(tape, result),
        den(std::move(den_)),
        shape(shape_),
        features(std::move(features_)),
        dqkv(use(input)) {}
  void backward(Tape& tape) override {
    if (!dqkv) return;
    const Tensor joint = qkv.load(tape), result = out.load(tape);
    const std::int64_t c = joint.shape().columns() / 3;
    Tensor workspace = workspace_for(tape, shape, features, c, LinearPass::backward, joint.dtype());
    Tensor gradient = tape.empty(joint.shape(), joint.dtype());
    const ConstTensorView x = joint.view();
    const TensorView dx = gradient.view();
    kernels::linear_attention_backward(tape.stream(), shape, features.map(), x.column_range(0, c), x.column_range(c, c),
                                       x.column_range(2 * c, c), result.view(), std::as_const(den).view(), dy().read(),
                                       dx.column_range(0, c), dx.column_range(c, c), dx.column_range(2 * c, c),
                                       workspace.view());
    dqkv.adopt(tape, std::move(gradient));
  }
  Saved qkv, out;
  Tensor den;
  LinearShape shape;
  AttentionFeatures features;
  Grad dqkv;
};

}  // namespace

Var linear_attention(Tape& tape, const Var& qkv, std::int64_t batch, std::int64_t heads,
                     const AttentionFeatures& features) {
  const std::int64_t rows = qkv.shape().rows(), c = qkv.shape().columns() / 3;
  if (batch < 1 || rows % batch != 0 || heads < 1 || c % heads != 0 || qkv.shape().columns() % 3 != 0) {
    throw ShapeError("linear_attention: qkv of shape {} for {} sequences and {} heads", qkv.shape().text(), batch,
                     heads);
  }
  const LinearShape shape{batch, heads, rows / batch};
  Tensor workspace = workspace_for(tape, shape, features, c, LinearPass::forward, qkv.dtype());
  Tensor out = tape.empty(Shape{rows, c}, qkv.dtype());
  Tensor den = tape.empty(Shape{rows, heads}, compute_dtype(qkv.dtype()));
  const ConstTensorView x = qkv.view();
  kernels::linear_attention_forward(tape.stream(), shape, features.map(), x.column_range(0, c), x.column_range(c, c),
                                    x.column_range(2 * c, c), out.view(), den.view(), {}, workspace.view());
  auto* node = tape.record<LinearAttentionNode>(tape, qkv, out, std::move(den), shape, features);
  return tape.output(std::move(out), node);
}

}  // namespace tforge
