#include "train/workplace.h"

#include "core/errors.h"
#include "core/log.h"
#include "kernels/device_libraries.h"

namespace tforge {

namespace {

Device checked(const Communicator& world, Device device) {
  if (device == Device::cpu) return device;
  const Devices found = devices_of(device);
  if (found.count == 0) {
    throw DeviceError(
        "run.device = \"{}\": there is none here: {}; use run.device = \"cpu\", or start where there is one",
        name_of(device), found.why_none);
  }
  if (world.size() > 1) {
    throw ConfigError("run.device = \"{}\" with {} ranks: several devices cannot be used together yet; start 1 rank",
                      name_of(device), world.size());
  }
  return device;
}

}  // namespace

Workplace::Workplace(const Communicator& world, Device device)
    : queue_(checked(world, device)),
      memory_(queue_.stream()),
      host_memory_(queue_.stream(), HostMemory::pinned),
      libraries_(std::make_unique<kernels::DeviceLibraries>(queue_.stream(), memory_)) {
  if (device != Device::cpu) log::info("computes on {} device 0 of {}", name_of(device), devices_of(device).count);
}

Workplace::~Workplace() = default;

}  // namespace tforge
