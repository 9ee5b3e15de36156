#include "autograd/saved.h"

#include "autograd/tape.h"
#include "kernels/elementwise.h"

namespace tforge {

Saved::Saved(Tape& tape, const Tensor& value) : stored_(value), dtype_(value.dtype()) {
  if (tape.saves().dtype == SavedDType::same || dtype_ == DType::bf16) return;
  stored_ = tape.empty(value.shape(), DType::bf16);
  kernels::convert(tape.stream(), value.view(), stored_.view());
}

Tensor Saved::load(Tape& tape) const {
  if (stored_.dtype() == dtype_) return stored_;
  Tensor value = tape.empty(stored_.shape(), dtype_);
  kernels::convert(tape.stream(), stored_.view(), value.view());
  return value;
}

}  // namespace tforge
