#include "checkpoint/staging.h"

#include <cstring>

#include "core/copy.h"

namespace tforge {

namespace {

std::uint64_t bytes_of(const CheckpointTensor& tensor, const RowBlock& block) {
  return static_cast<std::uint64_t>(block.rows * tensor.shape.columns()) * size_of(tensor.dtype);
}

}  // namespace

std::uint64_t bytes_of_blocks(const std::vector<CheckpointTensor>& tensors) {
  std::uint64_t bytes = 0;
  for (const CheckpointTensor& tensor : tensors) {
    for (const RowBlock& block : tensor.blocks) bytes += bytes_of(tensor, block);
  }
  return bytes;
}

void Staging::reserve(const std::vector<CheckpointTensor>& tensors) {
  const auto words = static_cast<std::int64_t>((bytes_of_blocks(tensors) + sizeof(double) - 1) / sizeof(double));
  if (memory_ && memory_.shape()[0] >= words) return;
  memory_ = Tensor();
  memory_ = Tensor::empty(allocator_, Shape{words}, DType::f64, Purpose::staging);
  // The system hands over pages when they are first written: now, and not while training waits.
  std::memset(memory_.view().data, 0, static_cast<std::size_t>(words) * sizeof(double));
}

void Staging::copy(std::vector<CheckpointTensor>& tensors) {
  reserve(tensors);
  auto* to = static_cast<std::byte*>(memory_.view().data);
  for (CheckpointTensor& tensor : tensors) {
    for (RowBlock& block : tensor.blocks) {
      const std::uint64_t bytes = bytes_of(tensor, block);
      const Shape shape{block.rows * tensor.shape.columns()};
      tforge::copy(allocator_.stream(), {block.data, tensor.dtype, block.device, shape, shape[0]},
                   {to, tensor.dtype, Device::cpu, shape, shape[0]});
      block.data = to;
      block.device = Device::cpu;
      to += bytes;
    }
  }
}

}  // namespace tforge
