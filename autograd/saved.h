#pragma once
// What an op keeps for its backward pass, and how much of it.
#include <cstdint>

#include "core/tensor.h"

namespace tforge {

class Tape;

/// What backward computes a second time instead of keeping it. Both are bit-equal to keeping: the same kernels run on
/// the same numbers in the same order.
///   none    everything is kept
///   scores  the scores [T, n] of every Pattention: one of its six products again ("selective" recomputation)
///   block   all of a block but its input: a second forward pass, with its collectives (activation checkpointing,
///           Chen et al., arXiv 1604.06174)
enum class Recompute : std::uint8_t { none, scores, block };

/// The dtype in which tensors wait for backward: that of the arithmetic, or bf16 (f32 arithmetic only), which halves
/// them and rounds each element to 8 bits of mantissa. Forward is the same in both.
enum class SavedDType : std::uint8_t { same, bf16 };

struct SavePolicy {
  Recompute recompute = Recompute::none;
  SavedDType dtype = SavedDType::same;
  friend bool operator==(const SavePolicy&, const SavePolicy&) = default;
};

/// A tensor that waits for backward in the dtype that its tape's policy names: the tensor itself, shared, or a rounded
/// copy. For what grows with T times a width; numbers of a row (norms, log-sum-exp) stay plain tensors.
class Saved {
 public:
  Saved() = default;
  /// Throws DTypeError for bf16 of anything but f32.
  Saved(Tape& tape, const Tensor& value);

  const Shape& shape() const { return stored_.shape(); }
  /// The tensor in the dtype it had: shared, to be read only, or widened to memory of its own.
  Tensor load(Tape& tape) const;

 private:
  Tensor stored_;
  DType dtype_ = DType::f32;
};

}  // namespace tforge
