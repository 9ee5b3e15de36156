#include "parallel/tp_reducer.h"

namespace tforge {

void TpReducer::sum(Stream& stream, TensorView x) {
  if (!is_identity()) tp_.all_reduce(stream, x, ReduceOp::sum);
}

void TpReducer::max(Stream& stream, TensorView x) {
  if (!is_identity()) tp_.all_reduce(stream, x, ReduceOp::max);
}

}  // namespace tforge
