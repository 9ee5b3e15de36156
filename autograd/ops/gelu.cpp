#include "autograd/ops/gelu.h"

#include "kernels/gelu.h"

namespace tforge {

namespace {

struct GeluNode final : Node {
  explicit GeluNode(const Var& input) : x(input.value()), dx(use(input)) {}
  void backward(Tape& tape) override {
    if (!dx) return;
    const GradTarget to = dx.target(tape);
    kernels::gelu_backward(tape.stream(), static_cast<const Tensor&>(x).view(), dy().read(), to.mode, to.view);
  }
  Tensor x;
  Grad dx;
};

}  // namespace

Var gelu(Tape& tape, const Var& x) {
  Tensor y = tape.empty(x.shape(), x.dtype());
  kernels::gelu_forward(tape.stream(), x.view(), y.view());
  return tape.output(std::move(y), tape.record<GeluNode>(x));
}

}  // namespace tforge
