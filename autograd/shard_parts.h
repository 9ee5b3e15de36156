#pragma once
// What the shards held here give to a sum over all shards.
#include <cstdint>
#include <utility>

#include "autograd/reducer.h"
#include "autograd/tape.h"
#include "autograd/var.h"

namespace tforge {

/// A result [rows, columns] to which every shard adds.
class ShardParts {
 public:
  /// One part a shard held here. The reducer outlives it.
  ShardParts(Tape& tape, Reducer& reducer, std::int64_t shards, const Shape& shape, DType dtype)
      : tape_(tape),
        reducer_(reducer),
        shape_(shape),
        parts_(tape.empty(Shape{shards * shape.rows(), shape.columns()}, dtype,
                          reducer.by_shard() ? Purpose::communication : Purpose::activations)) {}

  TensorView part(std::int64_t s) { return parts_.view().row_range(s * shape_.rows(), shape_.rows()); }
  /// With a reducer by_shard() the sum over the shards of all ranks, otherwise the one part. To be called once.
  Tensor total() {
    if (!reducer_.by_shard()) return std::move(parts_);
    Tensor sum = tape_.empty(shape_, parts_.dtype());
    reducer_.sum(tape_.stream(), std::as_const(parts_).view(), sum.view());
    parts_ = Tensor();
    return sum;
  }

 private:
  Tape& tape_;
  Reducer& reducer_;
  Shape shape_;
  Tensor parts_;
};

/// The gradient of an op's input to which every shard adds. `add(s, to)` computes the part of shard s into the
/// GradTarget `to`. Without a reducer by_shard() there is one shard, whose part is the gradient, PARTIAL.
template <class Add>
void add_input_gradient(Tape& tape, Grad& dx, Reducer& reducer, std::int64_t shards, const Shape& shape, DType dtype,
                        Add&& add) {
  if (!dx) return;
  if (!reducer.by_shard()) return add(0, dx.target(tape));
  ShardParts parts(tape, reducer, shards, shape, dtype);
  for (std::int64_t s = 0; s < shards; ++s) add(s, GradTarget{parts.part(s), GradMode::overwrite});
  dx.adopt(tape, parts.total());
}

}  // namespace tforge
