#include "parallel/grad_sync.h"

#include <cmath>
#include <utility>

namespace tforge {

GradSync::GradSync(Communicator& dp, Tensor flat) : dp_(dp), flat_(std::move(flat)) {}

void GradSync::finish(Stream& stream) {
  if (dp_.size() > 1) dp_.all_reduce(stream, flat_.view(), ReduceOp::sum);
}

double global_norm(Stream& stream, Communicator& tp, double sharded_squares, double replicated_squares) {
  tp.all_reduce(stream, TensorView{&sharded_squares, DType::f64, Device::cpu, Shape{1}, 1}, ReduceOp::sum);
  return std::sqrt(sharded_squares + replicated_squares);
}

}  // namespace tforge
