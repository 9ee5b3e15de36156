#include "autograd/ops/residual.h"

#include "kernels/elementwise.h"

namespace tforge {

namespace {

struct ResidualNode final : Node {
  ResidualNode(const Var& h, const Var& y) : dh(use(h)), dy_branch(use(y)) {}
  void backward(Tape& tape) override {
    if (dh) dh.adopt(tape, dy().share());
    if (dy_branch) dy_branch.adopt(tape, dy().share());
  }
  Grad dh, dy_branch;
};

}  // namespace

Var residual(Tape& tape, const Var& h, Var y) {
  Node* node = tape.record<ResidualNode>(h, y);
  Tensor sum = y.value().unique() ? std::move(y.value()) : tape.empty(h.shape(), h.dtype());
  if (y) kernels::add(tape.stream(), h.view(), y.view(), sum.view());
  else kernels::add(tape.stream(), h.view(), static_cast<const Tensor&>(sum).view(), sum.view());
  return tape.output(std::move(sum), node);
}

}  // namespace tforge
