#include "parallel/device_world.h"

#include "core/cuda_built.h"
#include "core/errors.h"
#include "parallel/cuda/nccl_communicator.h"

namespace tforge {

std::unique_ptr<Communicator> create_nccl(Communicator& world, const Stream& stream) {
  if constexpr (kCudaBuilt) {
    if (stream.device() == Device::cuda) return cuda::create_nccl(world, stream);
  }
  throw InternalError("NCCL on a {} stream of rank {}", name_of(stream.device()), world.rank());
}

}  // namespace tforge
