#include "autograd/ops/rms_norm.h"

#include "kernels/rms_norm.h"

namespace tforge {

namespace {

struct RmsNormNode final : Node {
  RmsNormNode(Tape& tape, const Var& input, const Var& weight_, Tensor rrms_)
      : x(tape, input.value()),
        weight(weight_.value()),
        rrms(std::move(rrms_)),
        dx(use(input)),
        dweight(use(weight_)) {}

  void backward(Tape& tape) override {
    const GradTarget none{{}, GradMode::overwrite};
    const GradTarget to_x = dx ? dx.target(tape) : none;
    const GradTarget to_w = dweight ? dweight.target(tape) : none;
    const Tensor input = x.load(tape);
    kernels::rms_norm_backward(tape.stream(), input.view(), view(weight), view(rrms), dy().read(), to_x.mode, to_x.view,
                               to_w.mode, to_w.view);
  }
  static ConstTensorView view(const Tensor& t) { return t.view(); }

  Saved x;
  Tensor weight, rrms;
  Grad dx, dweight;
};

}  // namespace

Var rms_norm(Tape& tape, const Var& x, const Var& weight, double eps) {
  Tensor y = tape.empty(x.shape(), x.dtype());
  Tensor rrms = tape.empty(Shape{x.shape().rows(), 1}, compute_dtype(x.dtype()));
  kernels::rms_norm_forward(tape.stream(), x.view(), weight.view(), eps, y.view(), rrms.view());
  return tape.output(std::move(y), tape.record<RmsNormNode>(tape, x, weight, std::move(rrms)));
}

}  // namespace tforge
