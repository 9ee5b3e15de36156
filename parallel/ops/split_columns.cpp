#include "parallel/ops/split_columns.h"

#include "core/errors.h"

namespace tforge {

namespace {

struct SplitColumnsNode final : Node {
  SplitColumnsNode(const Var& x, const ColumnPlan& columns, Communicator& over) : dx(use(x)), plan(columns), tp(over) {}
  void backward(Tape& tape) override {
    if (dx) dx.adopt(tape, columns_from_owners(tape, dy().read(), plan, tp));
  }
  Grad dx;
  const ColumnPlan& plan;
  Communicator& tp;
};

}  // namespace

Var split_columns(Tape& tape, const Var& x, const ColumnPlan& plan, Communicator& tp) {
  if (plan.common != 0) throw ShapeError("split_columns: {} common columns are not one rank's", plan.common);
  if (tp.size() == 1) return x;
  Node* node = tape.record<SplitColumnsNode>(x, plan, tp);
  return tape.output(own_columns(tape, x.view(), plan, tp), node);
}

}  // namespace tforge
