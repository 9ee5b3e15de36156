#pragma once
// Where memory lives and work runs.
#include <cstdint>
#include <string_view>

namespace tforge {

enum class Device : std::uint8_t { cpu, cuda };
std::string_view name_of(Device device);

/// Whether kernels do their work, or check their operands and report it (Stream::profile) and nothing else. In a
/// rehearsal memory is handed out and counted, but only addresses of it exist until somebody writes there.
enum class Execution : std::uint8_t { real, rehearsal };

/// How a CUDA device multiplies matrices of f32: as they are, or with operands rounded to the 10 bits of tf32 and sums
/// in f32, which is several times as fast.
enum class F32Products : std::uint8_t { exact, tf32 };

/// How a device chooses where several algorithms lead to the same result, up to rounding: by its library's rule, which
/// the same device and library repeat; or by the time that each takes.
enum class Choosing : std::uint8_t { rule, measured };

class Profile;
namespace kernels {
class DeviceLibraries;
}

/// The queue that kernels are issued to. On the CPU work is done when the call returns and `native` is null; on a CUDA
/// device `native` is its cudaStream_t, made and owned by a DeviceQueue (core/device_queue.h).
class Stream {
 public:
  explicit Stream(Device device = Device::cpu, void* native = nullptr) : device_(device), native_(native) {}
  Stream(Device device, Execution execution) : device_(device), execution_(execution) {}
  Device device() const { return device_; }
  bool rehearses() const { return execution_ == Execution::rehearsal; }
  void* native() const { return native_; }
  /// Where kernels report what they did (core/profile.h); null: nowhere.
  Profile* profile() const { return profile_; }
  void set_profile(Profile* profile) { profile_ = profile; }
  /// What the kernels of a device keep between calls (kernels/device_libraries.h); null: nothing yet.
  kernels::DeviceLibraries* libraries() const { return libraries_; }
  void set_libraries(kernels::DeviceLibraries* libraries) { libraries_ = libraries; }

 private:
  Device device_;
  Execution execution_ = Execution::real;
  void* native_ = nullptr;
  Profile* profile_ = nullptr;
  kernels::DeviceLibraries* libraries_ = nullptr;
};

/// Whether an output is replaced or added to.
enum class GradMode : std::uint8_t { overwrite, accumulate };

}  // namespace tforge
