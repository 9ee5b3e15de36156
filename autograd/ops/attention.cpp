#include "autograd/ops/attention.h"

#include "core/errors.h"
#include "kernels/attention.h"
#include "kernels/rotary.h"

namespace tforge {

namespace {

struct RotaryNode final : Node {
  RotaryNode(const Var& qkv, Tensor cosine_, Tensor sine_, std::int64_t heads_, std::int64_t seq_)
      : cosine(std::move(cosine_)), sine(std::move(sine_)), heads(heads_), seq(seq_), dqkv(use(qkv)) {}
  void backward(Tape& tape) override {
    if (!dqkv) return;
    Tensor gradient = dy().take(tape);
    kernels::rotary_apply(tape.stream(), kernels::RotaryDirection::backward, static_cast<const Tensor&>(cosine).view(),
                          static_cast<const Tensor&>(sine).view(), 2 * heads, seq, 0,
                          gradient.view().column_range(0, gradient.shape().columns() / 3 * 2));
    dqkv.adopt(tape, std::move(gradient));
  }
  Tensor cosine, sine;
  std::int64_t heads, seq;
  Grad dqkv;
};

struct AttentionNode final : Node {
  AttentionNode(Tape& tape, const Var& input, const Tensor& result, Tensor lse_, const kernels::AttentionShape& shape_)
      : qkv(tape, input.value()), out(tape, result), lse(std::move(lse_)), shape(shape_), dqkv(use(input)) {}
  void backward(Tape& tape) override {
    if (!dqkv) return;
    const Tensor joint = qkv.load(tape), result = out.load(tape);
    const std::int64_t c = joint.shape().columns() / 3;
    Tensor workspace = tape.empty(Shape{kernels::attention_workspace(shape, c / shape.heads, tape.stream().device())},
                                  compute_dtype(joint.dtype()), Purpose::workspace);
    Tensor gradient = tape.empty(joint.shape(), joint.dtype());
    const ConstTensorView x = joint.view();
    const TensorView dx = gradient.view();
    kernels::causal_attention_backward(tape.stream(), shape, x.column_range(0, c), x.column_range(c, c),
                                       x.column_range(2 * c, c), result.view(), static_cast<const Tensor&>(lse).view(),
                                       dy().read(), dx.column_range(0, c), dx.column_range(c, c),
                                       dx.column_range(2 * c, c), workspace.view());
    dqkv.adopt(tape, std::move(gradient));
  }
  Saved qkv, out;
  Tensor lse;
  kernels::AttentionShape shape;
  Grad dqkv;
};

}  // namespace

Var rotary(Tape& tape, Var qkv, const Tensor& cosine, const Tensor& sine, std::int64_t heads, std::int64_t seq) {
  if (cosine.shape().columns() == 0) return qkv;
  if (!qkv.value().unique()) throw InternalError("rotary: somebody else holds the value it changes");
  Node* node = tape.record<RotaryNode>(qkv, cosine, sine, heads, seq);
  Tensor x = std::move(qkv.value());
  kernels::rotary_apply(tape.stream(), kernels::RotaryDirection::forward, cosine.view(), sine.view(), 2 * heads, seq, 0,
                        x.view().column_range(0, x.shape().columns() / 3 * 2));
  return tape.output(std::move(x), node);
}

Var causal_attention(Tape& tape, const Var& qkv, std::int64_t batch, std::int64_t heads) {
  const std::int64_t rows = qkv.shape().rows(), c = qkv.shape().columns() / 3;
  if (batch < 1 || rows % batch != 0 || heads < 1 || c % heads != 0 || qkv.shape().columns() % 3 != 0) {
    throw ShapeError("causal_attention: qkv of shape {} for {} sequences and {} heads", qkv.shape().text(), batch,
                     heads);
  }
  const std::int64_t seq = rows / batch;
  const kernels::AttentionShape shape{batch, heads, seq, seq, seq};
  Tensor workspace = tape.empty(Shape{kernels::attention_workspace(shape, c / heads, tape.stream().device())},
                                compute_dtype(qkv.dtype()), Purpose::workspace);
  Tensor out = tape.empty(Shape{rows, c}, qkv.dtype());
  Tensor lse = tape.empty(Shape{rows, heads}, compute_dtype(qkv.dtype()));
  const ConstTensorView x = qkv.view();
  kernels::causal_attention_forward(tape.stream(), shape, x.column_range(0, c), x.column_range(c, c),
                                    x.column_range(2 * c, c), out.view(), lse.view(), workspace.view());
  auto* node = tape.record<AttentionNode>(tape, qkv, out, std::move(lse), shape);
  return tape.output(std::move(out), node);
}

}  // namespace tforge
