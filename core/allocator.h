#pragma once
// The one source of tensor memory of a process: a caching allocator that tags each block with its purpose.
//
// A training step asks for the same sizes in the same order, so from the third step on every request is served
// from blocks that earlier steps gave back and the operating system is not asked again (`system_requests` tells).
#include <array>
#include <cstddef>
#include <cstdint>
#include <map>
#include <string_view>
#include <vector>

namespace tforge {

enum class Purpose : std::uint8_t { weights, gradients, moments, activations, communication, workspace, staging };
inline constexpr int kPurposes = 7;
std::string_view name_of(Purpose purpose);

/// Bytes in use by purpose now and at the peak; `reserved` is what was asked of the operating system.
struct MemoryReport {
  std::array<std::size_t, kPurposes> in_use{};
  std::array<std::size_t, kPurposes> peak{};  // each purpose's own peak; they need not coincide
  std::size_t total_peak = 0;
  std::size_t reserved = 0;
  std::uint64_t system_requests = 0;
};

class Allocator;

/// A reference-counted block. Created and recycled by Allocator alone; the count is not atomic because tensors
/// belong to one thread.
class Storage {
 public:
  std::byte* data() const { return data_; }
  std::size_t bytes() const { return bytes_; }
  Purpose purpose() const { return purpose_; }

 private:
  friend class Allocator;
  friend class Tensor;
  std::byte* data_ = nullptr;
  std::size_t bytes_ = 0;     // asked for
  std::size_t capacity_ = 0;  // rounded up
  Purpose purpose_ = Purpose::workspace;
  Allocator* owner_ = nullptr;
  int references_ = 0;
};

/// Owner of all tensor memory. Lives in main, outlives every tensor, used by one thread.
/// Blocks are aligned to 64 bytes (large ones to 2 MiB, with huge pages advised).
class Allocator {
 public:
  Allocator() = default;
  ~Allocator();
  Allocator(const Allocator&) = delete;
  Allocator& operator=(const Allocator&) = delete;

  const MemoryReport& report() const { return report_; }
  /// Starts a new peak measurement from what is in use now.
  void reset_peak();

 private:
  friend class Tensor;
  /// Throws ResourceError (bytes, purpose, report by purpose) when the system has no more memory.
  Storage* acquire(std::size_t bytes, Purpose purpose);
  void release(Storage* storage);

  std::map<std::size_t, std::vector<Storage*>> free_;  // by capacity
  std::vector<Storage*> all_;
  MemoryReport report_;
  std::size_t total_in_use_ = 0;
};

}  // namespace tforge
