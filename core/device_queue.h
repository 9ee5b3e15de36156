#pragma once
// The devices that this process can compute on, and the queues of work for them.
#include <string>

#include "core/device.h"

namespace tforge {

/// Devices of one kind that this process sees. When there is none, `why_none` says so in half a sentence: the build has
/// no code for them, or what the driver answers.
struct Devices {
  int count = 0;
  std::string why_none;
};
Devices devices_of(Device kind);

/// A text that tells device `number` from every other, the same in all processes that see it. Of a CUDA device.
std::string id_of(Device kind, int number);

/// A queue of work on one device of this process, in order. Made in main and kept until everything that lives on the
/// device is gone. A process uses one CUDA device.
class DeviceQueue {
 public:
  /// Throws DeviceError when there is no device of that number.
  explicit DeviceQueue(Device device, int number = 0);
  ~DeviceQueue();
  DeviceQueue(const DeviceQueue&) = delete;
  DeviceQueue& operator=(const DeviceQueue&) = delete;

  Stream& stream() { return stream_; }

 private:
  Stream stream_;
};

/// What has to be seen to whenever the host waits for a device.
class WaitWatch {
 public:
  virtual ~WaitWatch() = default;
  /// Called before the host waits. May return before the device is done.
  virtual void before_wait() = 0;
};
/// From now on `watch` is that of the process (null: none), until it is set again. Returns the one before.
WaitWatch* set_wait_watch(WaitWatch* watch);

/// Returns when everything that was queued is done. Throws DeviceError when some of it failed.
void wait(const Stream& stream);

}  // namespace tforge
