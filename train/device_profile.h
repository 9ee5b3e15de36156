#pragma once
// A device as a few measured numbers, and the time of a step on it.
//
// A kernel's time is taken as calls a + FLOPs b + bytes c, with three costs a, b, c >= 0 of each kernel. Its FLOPs and
// bytes are those that it reports itself (core/profile.h), so the model has no sizes of its own. For a product b is the
// rate of its inner loop and c what a number costs beside it (packing, GELU and its slope, exponentials): a narrow
// layer is slower a FLOP because it has more numbers a FLOP.
#include <cstdint>
#include <map>
#include <span>
#include <string>
#include <string_view>

#include "core/dtype.h"
#include "core/profile.h"
#include "train/communication_model.h"

namespace tforge {

/// Seconds of a call, of a floating-point operation and of a byte.
struct KernelCost {
  double call = 0, flop = 0, byte = 0;
  double seconds(std::int64_t calls, const Work& work) const {
    return static_cast<double>(calls) * call + work.flops * flop + work.bytes * byte;
  }
};

struct DeviceProfile {
  std::string name;
  std::string date;
  std::int64_t threads = 1;  // of a rank
  Device device = Device::cpu;
  DType dtype = DType::f32;
  F32Products f32_products = F32Products::exact;
  double flops_per_second = 0;                // of a large product
  double bytes_per_second = 0;                // of a sum of large vectors
  std::map<std::string, KernelCost> kernels;  // by the name under which they report; and kBetweenKernels
  std::optional<Link> link;                   // between ranks

  /// Seconds of `kernel.calls` calls that did `kernel.work`. A kernel that is not in the profile works at the rate of
  /// the large product or at that of memory, whichever takes longer.
  double seconds(const Profile::Entry& kernel) const;
  /// dtype, or "tf32".
  std::string precision() const { return f32_products == F32Products::tf32 ? "tf32" : std::string(name_of(dtype)); }
  bool knows(std::string_view kernel) const { return kernels.contains(std::string(kernel)); }
};

/// What a step takes beside its kernels, as a cost of each kernel call.
inline constexpr const char* kBetweenKernels = "between_kernels";

/// One kernel in one measured step.
struct KernelSample {
  std::int64_t calls = 0;
  Work work;
  double seconds = 0;
  double step_seconds = 0;  // of the whole step
};
/// The costs, none below 0 and that of a call at most 50 us, with the least sum of squares of (predicted - seconds) /
/// step_seconds: an error counts by what it does to the prediction of its step. Exact for samples that follow the
/// model. `samples` is not empty.
KernelCost fit(std::span<const KernelSample> samples);

/// TOML:
///   [device]   name, date (texts), device ("cpu"), threads (1), dtype ("f32"; "tf32" is f32 with such products),
///              gflops, gbytes (a second, of a large product and sum)
///   [link]     may be absent: gbytes (a second and direction), latency_us
///   [kernels]  may be absent: NAME = { gflops, gbytes, call_us }, rates a second and microseconds a call; what is left
///              out costs nothing
/// Throws ConfigError naming file and key.
DeviceProfile parse_device_profile(std::string_view text, const std::string& source);
DeviceProfile load_device_profile(const std::string& path);
std::string to_toml(const DeviceProfile& profile);

}  // namespace tforge
