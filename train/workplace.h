#pragma once
// Where a job computes: the queue, the memory and the libraries of its device.
#include <memory>
#include <string>

#include "core/allocator.h"
#include "core/device_queue.h"
#include "parallel/communicator.h"
#include "parallel/device_world.h"
#include "train/config.h"

namespace tforge {

/// `config`, of a checkpoint, for a job that computes without training: on `device` ("cpu", "cuda"), whatever the run
/// used. Throws UsageError for another name, ConfigError when the device has no kernels for the model.
RunConfig placed(RunConfig config, const std::string& device, bool share_device);

/// Made in main, outlives everything that computes.
class Workplace {
 public:
  /// `device` is run.device, `use` is parallel.share_device, `f32` is train.tf32, `how` is run.products. Rank i of a
  /// host takes device i of those that it sees; where ranks share them, modulo their number. Throws DeviceError when a
  /// rank sees no such device, ConfigError when two ranks would use the same one and may not. Collective.
  Workplace(Communicator& world, Device device, DeviceUse use = DeviceUse::own, F32Products f32 = F32Products::exact,
            Choosing how = Choosing::rule);
  Workplace(Communicator& world, const RunConfig& config);
  ~Workplace();
  Workplace(const Workplace&) = delete;
  Workplace& operator=(const Workplace&) = delete;

  Stream& stream() { return queue_.stream(); }
  /// All ranks of the job, for tensors of the device and of the host.
  Communicator& world() { return device_world_ ? *device_world_ : world_; }
  /// Of the device.
  Allocator& memory() { return memory_; }
  /// Of the host, for what goes to the device and comes back: pinned; on the CPU memory() itself.
  Allocator& host_memory() { return memory_.device() == Device::cpu ? memory_ : host_memory_; }
  kernels::DeviceLibraries& libraries() { return *libraries_; }

 private:
  Communicator& world_;
  DeviceQueue queue_;
  std::unique_ptr<Communicator> device_world_;
  Allocator memory_, host_memory_;
  std::unique_ptr<kernels::DeviceLibraries> libraries_;
};

}  // namespace tforge
