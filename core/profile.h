#pragma once
// Where the time of a stream goes: seconds, floating-point operations and bytes by kernel.
#include <chrono>
#include <cstdint>
#include <string_view>
#include <vector>

#include "core/device.h"

namespace tforge {

/// What a kernel has to do at least: its arithmetic (a fused multiply-add is two operations) and the memory that it
/// reads and writes once each, scratch not counted.
struct Work {
  double flops = 0;
  double bytes = 0;
};

/// Gathers what the kernels of one stream report while it hangs there (Stream::set_profile). Not for several threads.
class Profile {
 public:
  struct Entry {
    std::string_view name;
    std::int64_t calls = 0;
    double seconds = 0;
    Work work;
  };
  void add(std::string_view name, double seconds, Work work);
  /// In the order of first use.
  const std::vector<Entry>& entries() const { return entries_; }
  void clear() { entries_.clear(); }

 private:
  std::vector<Entry> entries_;
};

/// Times its own life as one call of `name`, a string literal. Free of cost on a stream without a profile. With one the
/// host waits for a device before and after, so that a kernel has its time, its start included, and nothing overlaps.
class ProfileScope {
 public:
  ProfileScope(const Stream& stream, const char* name, Work work) : stream_(stream), name_(name), work_(work) {
    if (stream_.profile() != nullptr) begin();
  }
  ~ProfileScope() {
    if (stream_.profile() != nullptr) end();
  }
  ProfileScope(const ProfileScope&) = delete;
  ProfileScope& operator=(const ProfileScope&) = delete;

 private:
  void begin();
  void end();

  const Stream& stream_;
  const char* name_;
  Work work_;
  std::chrono::steady_clock::time_point begun_;
};

}  // namespace tforge
