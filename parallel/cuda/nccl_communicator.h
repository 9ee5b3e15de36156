#pragma once
// Exists in builds with CUDA alone; nothing of CUDA shows in this header.
#include <memory>

#include "parallel/communicator.h"

namespace tforge::cuda {

/// See parallel/device_world.h.
std::unique_ptr<Communicator> create_nccl(Communicator& world, const Stream& stream);

}  // namespace tforge::cuda
