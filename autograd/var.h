#pragma once
// Var: a value that may receive a gradient. Grad: the place where that gradient is gathered.
//
// The value and the gradient slot are counted apart: a node that needs only the gradient of its output holds a Grad,
// and the output's value is freed as soon as nobody reads it.
#include <cstdint>

#include "core/device.h"
#include "core/tensor.h"

namespace tforge {

class Tape;
class Var;

/// Hears how far a backward pass is.
class GradHook {
 public:
  virtual ~GradHook() = default;
  /// Once in a pass for each parameter used in it: its gradient will not change any more.
  virtual void gradient_ready(int parameter_id) = 0;
  /// After every node, for the hook of the tape.
  virtual void node_done() {}
};

/// Where an op's backward writes: overwrite or accumulate into `view`.
struct GradTarget {
  TensorView view;
  GradMode mode;
};

/// A shared handle to a gradient slot. Empty when no gradient is wanted.
class Grad {
 public:
  Grad() = default;
  Grad(const Grad& other);
  Grad(Grad&& other) noexcept;
  Grad& operator=(Grad other) noexcept;
  ~Grad();

  explicit operator bool() const { return slot_ != nullptr; }
  /// True once a gradient was written in this backward pass.
  bool written() const;
  /// The gathered gradient. Throws InternalError when none was written.
  ConstTensorView read() const;
  /// Where to write: allocates on first use (overwrite), copies first when the tensor is shared with another slot.
  GradTarget target(Tape& tape);
  /// Hands over a whole gradient tensor: becomes the gradient without a copy, or is added to what is there.
  void adopt(Tape& tape, Tensor gradient);
  /// The gathered gradient as a tensor that nobody else shares (copied if shared); leaves the slot empty.
  Tensor take(Tape& tape);
  /// True when the gradient is the 1 that Tape::backward(loss) began with, and nothing was added.
  bool is_seed() const;
  /// The gathered gradient as a shared tensor, to be read or handed on.
  Tensor share() const;

 private:
  friend class Tape;
  friend class Var;
  friend class Node;
  struct Slot;
  explicit Grad(Slot* slot);
  Slot* slot_ = nullptr;
};

class Var {
 public:
  Var() = default;
  /// A value that no gradient flows into.
  explicit Var(Tensor value) : value_(std::move(value)) {}
  /// A parameter: `gradient` (of the same shape; of the same dtype or of compute_dtype()) is its permanent place,
  /// `hook` may be null.
  static Var parameter(Tensor value, Tensor gradient, GradHook* hook, int parameter_id);

  const Tensor& value() const { return value_; }
  Tensor& value() { return value_; }
  ConstTensorView view() const { return static_cast<const Tensor&>(value_).view(); }
  const Shape& shape() const { return value_.shape(); }
  DType dtype() const { return value_.dtype(); }
  bool requires_grad() const { return static_cast<bool>(grad_); }
  const Grad& grad() const { return grad_; }
  /// For a parameter: forgets the gradient, so that the next contribution overwrites. No pass over memory.
  void clear_grad();
  /// For a parameter: a frozen one (false) takes part in forward only.
  explicit operator bool() const { return static_cast<bool>(value_); }

 private:
  friend class Tape;
  Var(Tensor value, Grad grad) : value_(std::move(value)), grad_(std::move(grad)) {}
  Tensor value_;
  Grad grad_;
};

}  // namespace tforge
