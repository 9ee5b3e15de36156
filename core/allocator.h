#pragma once
// The one source of tensor memory of a process: a caching allocator that tags each block with its purpose.
//
// A training step asks for the same sizes in the same order, so from the third step on every request is served
// from blocks that earlier steps gave back and the operating system or device is not asked again (`system_requests`
// tells).
#include <array>
#include <cstddef>
#include <cstdint>
#include <map>
#include <string_view>
#include <vector>

#include "core/device.h"

namespace tforge {

enum class Purpose : std::uint8_t { weights, gradients, moments, activations, communication, workspace, staging };
inline constexpr int kPurposes = 7;
std::string_view name_of(Purpose purpose);

/// Bytes in use by purpose now and at the peak; `reserved` is what is held of the operating system or device.
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

/// Host memory from which a device copies without the processor's help; see core/copy.h.
enum class HostMemory : std::uint8_t { pinned };

/// Owner of all tensor memory of one device. Lives in main, outlives every tensor, used by one thread.
/// Blocks of host memory are aligned to 64 bytes (large ones to 2 MiB, with huge pages advised), those of a device to
/// 256. A block given back may be handed out while the device still works on it, because everything that is done with
/// it is queued on one stream, in order; who hands it to another stream lets that one's work end first.
class Allocator {
 public:
  /// Memory of the stream's device. Tensors are cleared and copied on that stream.
  explicit Allocator(const Stream& stream = Stream()) : stream_(stream), device_(stream.device()) {}
  /// Pinned memory of the host for copies on `stream`; ordinary memory where that is the CPU's.
  Allocator(const Stream& stream, HostMemory) : stream_(stream), device_(Device::cpu) {}
  ~Allocator();
  Allocator(const Allocator&) = delete;
  Allocator& operator=(const Allocator&) = delete;

  /// Where the memory is.
  Device device() const { return device_; }
  const Stream& stream() const { return stream_; }
  const MemoryReport& report() const { return report_; }
  /// Starts a new peak measurement from what is in use now.
  void reset_peak();

 private:
  friend class Tensor;
  /// Throws ResourceError (bytes, purpose, report by purpose) when there is no more memory.
  Storage* acquire(std::size_t bytes, Purpose purpose);
  void release(Storage* storage);
  /// From the system and back to it.
  void* request(std::size_t capacity);
  void give_back(Storage* storage);
  /// Gives back every block that nobody uses.
  void give_back_free();

  Stream stream_;
  Device device_;
  std::map<std::size_t, std::vector<Storage*>> free_;  // by capacity
  std::vector<Storage*> all_;
  MemoryReport report_;
  std::size_t total_in_use_ = 0;
};

}  // namespace tforge
