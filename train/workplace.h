#pragma once
// Where a job computes: the queue, the memory and the libraries of its device.
#include <memory>

#include "core/allocator.h"
#include "core/device_queue.h"
#include "parallel/communicator.h"

namespace tforge {

/// Made in main, outlives everything that computes.
class Workplace {
 public:
  /// `device` is run.device. Throws DeviceError when this process sees no such device, ConfigError for a CUDA device
  /// and several ranks, whose collectives need NCCL.
  Workplace(const Communicator& world, Device device);
  ~Workplace();
  Workplace(const Workplace&) = delete;
  Workplace& operator=(const Workplace&) = delete;

  Stream& stream() { return queue_.stream(); }
  /// Of the device.
  Allocator& memory() { return memory_; }
  /// Of the host, for what goes to the device and comes back: pinned; on the CPU memory() itself.
  Allocator& host_memory() { return memory_.device() == Device::cpu ? memory_ : host_memory_; }

 private:
  DeviceQueue queue_;
  Allocator memory_, host_memory_;
  std::unique_ptr<kernels::DeviceLibraries> libraries_;
};

}  // namespace tforge
