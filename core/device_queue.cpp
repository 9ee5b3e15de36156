#include "core/device_queue.h"

#include "core/cuda/runtime.h"
#include "core/cuda_built.h"
#include "core/errors.h"

namespace tforge {

std::string_view name_of(Device device) {
  switch (device) {
    case Device::cpu: return "cpu";
    case Device::cuda: return "cuda";
  }
  return "?";
}

Devices devices_of(Device kind) {
  if (kind == Device::cpu) return {1, ""};
  if constexpr (kCudaBuilt) return cuda::devices();
  return {0, "this build has no CUDA code (configure with -DTFORGE_CUDA=ON)"};
}

std::string id_of(Device kind, int number) {
  if constexpr (kCudaBuilt) {
    if (kind == Device::cuda) return cuda::id_of(number);
  }
  throw InternalError("the id of {} device {}", name_of(kind), number);
}

DeviceQueue::DeviceQueue(Device device, int number) {
  if (device == Device::cpu) return;
  const Devices found = devices_of(device);
  if (found.count == 0) throw DeviceError("no {} device: {}", name_of(device), found.why_none);
  if (number < 0 || number >= found.count) {
    throw DeviceError("no {} device {}: this process sees {}", name_of(device), number, found.count);
  }
  if constexpr (kCudaBuilt) stream_ = Stream(device, cuda::create_stream(number));
}

DeviceQueue::~DeviceQueue() {
  if constexpr (kCudaBuilt) {
    if (stream_.native() != nullptr) cuda::destroy_stream(stream_.native());
  }
}

WaitWatch* set_wait_watch(WaitWatch* watch) {
  if constexpr (kCudaBuilt) return cuda::set_wait_watch(watch);
  return nullptr;
}

void wait(const Stream& stream) {
  if constexpr (kCudaBuilt) {
    if (stream.device() == Device::cuda) cuda::wait(stream);
  }
}

}  // namespace tforge
