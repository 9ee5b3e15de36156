#pragma once
// A copy of the rows that this rank writes, so that training may go on while they are on their way to the disk.
#include <cstdint>
#include <vector>

#include "checkpoint/checkpoint.h"
#include "core/tensor.h"

namespace tforge {

class Staging {
 public:
  /// `allocator` is one of host memory.
  explicit Staging(Allocator& allocator) : allocator_(allocator) {}

  /// Takes the memory for a copy of these blocks (Purpose::staging); keeps what it has where that is enough.
  /// Throws ResourceError.
  void reserve(const std::vector<CheckpointTensor>& tensors);
  /// Copies the rows of all blocks, from wherever they are, and points the blocks at the copies, which stay as they are
  /// until the next call.
  void copy(std::vector<CheckpointTensor>& tensors);

 private:
  Allocator& allocator_;
  Tensor memory_;
};

/// Bytes of the rows in the blocks of this rank.
std::uint64_t bytes_of_blocks(const std::vector<CheckpointTensor>& tensors);

}  // namespace tforge
