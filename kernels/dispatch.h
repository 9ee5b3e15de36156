#pragma once
// The one line in which a kernel's public function chooses the code for the stream's device.
#include "core/cuda_built.h"
#include "core/device.h"

namespace tforge::kernels {

/// Calls `cuda` for a stream of a CUDA device, `cpu` else, and nothing in a rehearsal. A build without CUDA does not
/// look at `cuda`: it is a generic lambda, [&](auto) { return cuda::kernel(...); }, that nothing instantiates there.
template <class Cpu, class Cuda>
void on_device(const Stream& stream, const Cpu& cpu, [[maybe_unused]] const Cuda& cuda) {
  if (stream.rehearses()) return;
  if constexpr (kCudaBuilt) {
    if (stream.device() == Device::cuda) return cuda(kCudaBuilt);
  }
  cpu();
}

/// The same for a kernel that has code for the CPU only (check_cpu).
template <class Cpu>
void on_cpu(const Stream& stream, const Cpu& cpu) {
  if (!stream.rehearses()) cpu();
}

}  // namespace tforge::kernels
