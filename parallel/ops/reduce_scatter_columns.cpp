#include "parallel/ops/reduce_scatter_columns.h"

namespace tforge {

namespace {

struct ReduceScatterColumnsNode final : Node {
  ReduceScatterColumnsNode(const Var& x, const ColumnPlan& columns, Communicator& over)
      : dx(use(x)), plan(columns), tp(over) {}
  void backward(Tape& tape) override {
    if (dx) dx.adopt(tape, columns_from_owners(tape, dy().read(), plan, tp));
  }
  Grad dx;
  const ColumnPlan& plan;
  Communicator& tp;
};

}  // namespace

Var reduce_scatter_columns(Tape& tape, const Var& x, const ColumnPlan& plan, Communicator& tp) {
  if (tp.size() == 1) return x;
  Node* node = tape.record<ReduceScatterColumnsNode>(x, plan, tp);
  return tape.output(columns_to_owners(tape, x.view(), plan, tp), node);
}

}  // namespace tforge
