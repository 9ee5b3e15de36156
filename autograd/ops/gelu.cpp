#include "autograd/ops/gelu.h"

#include "kernels/gelu.h"

namespace tforge {

namespace {

struct GeluNode final : Node {
  GeluNode(Tape& tape, const Var& input) : x(tape, input.value()), dx(use(input)) {}
  void backward(Tape& tape) override {
    if (!dx) return;
    const Tensor value = x.load(tape);
    const GradTarget to = dx.target(tape);
    kernels::gelu_backward(tape.stream(), value.view(), dy().read(), to.mode, to.view);
  }
  Saved x;
  Grad dx;
};

}  // namespace

Var gelu(Tape& tape, const Var& x) {
  Tensor y = tape.empty(x.shape(), x.dtype());
  kernels::gelu_forward(tape.stream(), x.view(), y.view());
  return tape.output(std::move(y), tape.record<GeluNode>(tape, x));
}

}  // namespace tforge
