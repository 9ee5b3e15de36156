#include "train/stop_polls.h"

namespace tforge {

void StopPolls::vote(bool gives_up) {
  std::int32_t votes = gives_up ? 1 : 0;
  world_.all_reduce(stream_, {&votes, DType::i32, Device::cpu, Shape{1}, 1}, ReduceOp::max);
  if (votes > 0) throw GivenUp{};
}

}  // namespace tforge
