#include "parallel/ops/gather_columns.h"

#include "core/errors.h"

namespace tforge {

namespace {

struct GatherColumnsNode final : Node {
  GatherColumnsNode(const Var& x, const ColumnPlan& columns, Communicator& over, Incoming incoming)
      : dx(use(x)), plan(columns), tp(over), gradient(incoming) {}
  void backward(Tape& tape) override {
    if (!dx) return;
    dx.adopt(tape, gradient == Incoming::partial ? columns_to_owners(tape, dy().read(), plan, tp)
                                                 : own_columns(tape, dy().read(), plan, tp));
  }
  Grad dx;
  const ColumnPlan& plan;
  Communicator& tp;
  Incoming gradient;
};

}  // namespace

Var gather_columns(Tape& tape, const Var& x, const ColumnPlan& plan, Communicator& tp, Incoming gradient) {
  if (plan.common != 0) throw ShapeError("gather_columns: {} common columns cannot be gathered", plan.common);
  if (tp.size() == 1) return x;
  Node* node = tape.record<GatherColumnsNode>(x, plan, tp, gradient);
  return tape.output(columns_from_owners(tape, x.view(), plan, tp), node);
}

}  // namespace tforge
