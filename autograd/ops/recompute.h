#pragma once
// Activation checkpointing (Chen et al., arXiv 1604.06174): a part of the model of which only the input is kept.
#include <utility>

#include "autograd/saved.h"
#include "autograd/tape.h"
#include "autograd/var.h"
#include "core/errors.h"

namespace tforge {

template <class F>
struct RecomputeNode final : Node {
  RecomputeNode(Tape& tape, const Var& input, F function) : f(std::move(function)), x(tape, input.value()) {
    dx = use(input);
  }
  void backward(Tape& tape) override {
    Tape& again = tape.inner();
    Var input = again.leaf(x.load(tape));
    x = Saved();
    Grad gradient = input.grad();
    again.backward(f(again, std::move(input)), dy().take(tape));
    if (gradient.written()) dx.adopt(tape, gradient.take(tape));
  }
  F f;
  Saved x;
  Grad dx;
};

/// y = f(tape, x), f a composition of ops: Var(Tape& tape, Var x). Forward records none of them. Backward runs f once
/// more on a recording of its own, which keeps everything as it is, and goes back through that: the same bits as
/// without, and each collective of f's forward a second time, in the same order on every rank.
/// f lives in the tape and must not own memory. It may use parameters, which must be used nowhere else in the pass
/// (their GradHook is called when f's own backward is through). x must want a gradient while the tape records
/// (InternalError), else those would get none. Saves x.
template <class F>
Var recomputed(Tape& tape, Var x, F f) {
  if (!tape.recording()) return f(tape, std::move(x));
  if (!x.requires_grad()) throw InternalError("recomputed: the input wants no gradient");
  Node* node = tape.record<RecomputeNode<F>>(tape, x, f);
  Tape quiet(tape.allocator(), tape.stream(), TapeMode::inference);
  quiet.share_floored_rows(tape);
  Var y = f(quiet, Var(std::move(x.value())));
  return tape.output(std::move(y.value()), node);
}

}  // namespace tforge
