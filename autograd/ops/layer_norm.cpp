#include "autograd/ops/layer_norm.h"

#include "kernels/layer_norm.h"

namespace tforge {

namespace {

struct LayerNormNode final : Node {
  LayerNormNode(Tape& tape, const Var& input, const Tensor& y, const Var& weight_, const Var& bias, Tensor mean_,
                Tensor rstd_)
      : x(tape, weight_ ? input.value() : y),
        weight(weight_.value()),
        mean(std::move(mean_)),
        rstd(std::move(rstd_)),
        dx(use(input)),
        dweight(use(weight_)),
        dbias(use(bias)) {}

  void backward(Tape& tape) override {
    const GradTarget none{{}, GradMode::overwrite};
    const GradTarget to_x = dx ? dx.target(tape) : none;
    const GradTarget to_w = dweight ? dweight.target(tape) : none;
    const GradTarget to_b = dbias ? dbias.target(tape) : none;
    kernels::layer_norm_backward(tape.stream(), view(x.load(tape)), view(weight), view(mean), view(rstd), dy().read(),
                                 to_x.mode, to_x.view, to_w.mode, to_w.view, to_b.view);
  }
  static ConstTensorView view(const Tensor& t) { return t ? t.view() : ConstTensorView{}; }

  Saved x;  // without parameters the result, which the op that reads it keeps as well
  Tensor weight, mean, rstd;
  Grad dx, dweight, dbias;
};

}  // namespace

Var layer_norm(Tape& tape, const Var& x, const Var& weight, const Var& bias, double eps) {
  const Shape column{x.shape().rows(), 1};
  Tensor y = tape.empty(x.shape(), x.dtype());
  Tensor rstd = tape.empty(column, compute_dtype(x.dtype())), mean;
  if (weight) mean = tape.empty(column, rstd.dtype());
  kernels::layer_norm_forward(tape.stream(), x.view(), weight ? weight.view() : ConstTensorView{},
                              bias ? bias.view() : ConstTensorView{}, eps, y.view(), mean.view(), rstd.view());
  auto* node = tape.record<LayerNormNode>(tape, x, y, weight, bias, std::move(mean), std::move(rstd));
  return tape.output(std::move(y), node);
}

}  // namespace tforge
