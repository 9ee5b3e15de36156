#include "parallel/ops/gather_columns.h"

#include "core/errors.h"

namespace tforge {

namespace {

struct GatherColumnsNode final : Node {
  GatherColumnsNode(const Var& x, const ColumnPlan& columns, Communicator& over)
      : dx(use(x)), plan(columns), tp(over) {}
  void backward(Tape& tape) override {
    if (dx) dx.adopt(tape, columns_to_owners(tape, dy().read(), plan, tp));
  }
  Grad dx;
  const ColumnPlan& plan;
  Communicator& tp;
};

}  // namespace

Var gather_columns(Tape& tape, const Var& x, const ColumnPlan& plan, Communicator& tp) {
  if (plan.common != 0) throw ShapeError("gather_columns: {} common columns cannot be gathered", plan.common);
  if (tp.size() == 1) return x;
  Node* node = tape.record<GatherColumnsNode>(x, plan, tp);
  return tape.output(columns_from_owners(tape, x.view(), plan, tp), node);
}

}  // namespace tforge
