#pragma once
// Where memory lives and work runs.
#include <cstdint>

namespace tforge {

enum class Device : std::uint8_t { cpu, cuda };

class Profile;

/// The queue that kernels are issued to. On the CPU work is done when the call returns and `native` is null.
class Stream {
 public:
  explicit Stream(Device device = Device::cpu, void* native = nullptr) : device_(device), native_(native) {}
  Device device() const { return device_; }
  void* native() const { return native_; }
  /// Where kernels report what they did (core/profile.h); null: nowhere.
  Profile* profile() const { return profile_; }
  void set_profile(Profile* profile) { profile_ = profile; }

 private:
  Device device_;
  void* native_;
  Profile* profile_ = nullptr;
};

/// Whether an output is replaced or added to.
enum class GradMode : std::uint8_t { overwrite, accumulate };

}  // namespace tforge
