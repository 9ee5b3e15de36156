#pragma once
// The one line in which a kernel's public function chooses the code for the stream's device.
#include "core/cuda_built.h"
#include "core/device.h"

namespace tforge::kernels {

/// Calls `cuda` for a stream of a CUDA device, `cpu` else. A build without CUDA does not look at `cuda`: it is a
/// generic lambda, [&](auto) { return cuda::kernel(...); }, that nothing instantiates there.
template <class Cpu, class Cuda>
decltype(auto) on_device(const Stream& stream, const Cpu& cpu, [[maybe_unused]] const Cuda& cuda) {
  if constexpr (kCudaBuilt) {
    if (stream.device() == Device::cuda) return cuda(kCudaBuilt);
  }
  return cpu();
}

}  // namespace tforge::kernels
