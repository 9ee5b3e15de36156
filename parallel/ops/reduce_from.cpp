#include "parallel/ops/reduce_from.h"

#include <utility>

namespace tforge {

namespace {

struct ReduceFromNode final : Node {
  explicit ReduceFromNode(const Var& x) : dx(use(x)) {}
  void backward(Tape& tape) override {
    if (dx) dx.adopt(tape, dy().share());
  }
  Grad dx;
};

}  // namespace

Var reduce_from(Tape& tape, Var x, Communicator& tp) {
  if (tp.size() == 1) return x;
  Node* node = tape.record<ReduceFromNode>(x);
  Tensor sum = x.value().unique() ? std::move(x.value()) : x.value().clone(tape.allocator());
  tp.all_reduce(tape.stream(), sum.view(), ReduceOp::sum);
  return tape.output(std::move(sum), node);
}

}  // namespace tforge
