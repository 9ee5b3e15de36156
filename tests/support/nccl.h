#pragma once
// Tests over NCCL.
#include <dlfcn.h>

#include <string>

#include "core/device_queue.h"

namespace tforge::test {

/// Why this many ranks cannot use NCCL here, or an empty text. They want a device each, unless it is the one over MPI
/// (nccl_shim), which lets them share one.
inline std::string why_no_nccl(int ranks) {
  const Devices found = devices_of(Device::cuda);
  if (found.count == 0) return "no CUDA device: " + found.why_none;
  void* library = ::dlopen("libnccl.so.2", RTLD_NOW | RTLD_LOCAL);
  const bool over_mpi = library != nullptr && ::dlsym(library, "tforge_nccl_over_mpi") != nullptr;
  return found.count >= ranks || over_mpi ? "" : "NCCL wants a device for each rank";
}

/// Why ranks cannot use a device together through pinned memory, or an empty text.
inline std::string why_no_device(int) {
  const Devices found = devices_of(Device::cuda);
  return found.count == 0 ? "no CUDA device: " + found.why_none : "";
}

}  // namespace tforge::test
