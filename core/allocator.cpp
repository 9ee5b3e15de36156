#include "core/allocator.h"

#include <sys/mman.h>

#include <algorithm>
#include <cstdlib>

#include "core/cuda/runtime.h"
#include "core/cuda_built.h"
#include "core/errors.h"

namespace tforge {

std::string_view name_of(Purpose purpose) {
  switch (purpose) {
    case Purpose::weights: return "weights";
    case Purpose::gradients: return "gradients";
    case Purpose::moments: return "moments";
    case Purpose::activations: return "activations";
    case Purpose::communication: return "communication";
    case Purpose::workspace: return "workspace";
    case Purpose::staging: return "staging";
  }
  return "?";
}

namespace {

constexpr std::size_t kSmallAlignment = 64;
constexpr std::size_t kLargeBlock = std::size_t{2} << 20;  // a huge page

std::size_t rounded(std::size_t bytes) {
  // Coarser steps for larger blocks, so that a slightly different request can reuse an old block.
  const std::size_t step = bytes >= kLargeBlock ? std::size_t{64} << 10 : std::size_t{1} << 10;
  return std::max<std::size_t>((bytes + step - 1) / step * step, step);
}

}  // namespace

Allocator::~Allocator() {
  for (Storage* storage : all_) give_back(storage);
}

void* Allocator::request(std::size_t capacity) {
  if (stream_.rehearses()) {
    void* data = ::mmap(nullptr, capacity, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    return data == MAP_FAILED ? nullptr : data;
  }
  if constexpr (kCudaBuilt) {
    if (device_ == Device::cuda) return cuda::allocate(capacity);
    if (stream_.device() == Device::cuda) return cuda::allocate_pinned(capacity);
  }
  const bool large = capacity >= kLargeBlock;
  const std::size_t alignment = large ? kLargeBlock : kSmallAlignment;
  void* data = std::aligned_alloc(alignment, (capacity + alignment - 1) / alignment * alignment);
  if (data != nullptr && large) ::madvise(data, capacity, MADV_HUGEPAGE);  // advice: its failure changes nothing
  return data;
}

void Allocator::give_back(Storage* storage) {
  if (stream_.rehearses()) {
    ::munmap(storage->data_, storage->capacity_);
    delete storage;
    return;
  }
  if constexpr (kCudaBuilt) {
    if (stream_.device() == Device::cuda) {
      if (device_ == Device::cuda) cuda::release(storage->data_);
      else cuda::release_pinned(storage->data_);
      storage->data_ = nullptr;
    }
  }
  std::free(storage->data_);
  delete storage;
}

void Allocator::give_back_free() {
  for (auto& [capacity, blocks] : free_) blocks.clear();
  std::erase_if(all_, [this](Storage* storage) {
    if (storage->references_ > 0) return false;
    report_.reserved -= storage->capacity_;
    give_back(storage);
    return true;
  });
}

Storage* Allocator::acquire(std::size_t bytes, Purpose purpose) {
  const std::size_t capacity = rounded(bytes);
  Storage* storage = nullptr;
  // A free block of up to an eighth more than asked for is good enough; its list is never erased, so that the
  // steady state touches no other memory either.
  for (auto it = free_.lower_bound(capacity); it != free_.end() && it->first <= capacity + capacity / 8; ++it) {
    if (it->second.empty()) continue;
    storage = it->second.back();
    it->second.pop_back();
    break;
  }
  if (storage == nullptr) {
    void* data = request(capacity);
    if (data == nullptr) {  // free blocks of other sizes may be in the way
      give_back_free();
      data = request(capacity);
    }
    if (data == nullptr) {
      std::string use;
      for (int i = 0; i < kPurposes; ++i) {
        use += fmt::format("{}{} {} MiB", i > 0 ? ", " : "", name_of(static_cast<Purpose>(i)),
                           report_.in_use[static_cast<std::size_t>(i)] >> 20);
      }
      throw ResourceError("out of {}memory: {} bytes for {} on top of {}; use a smaller batch or model, or more ranks",
                          device_ == Device::cpu ? "" : "CUDA ", bytes, name_of(purpose), use);
    }
    storage = new Storage;
    storage->data_ = static_cast<std::byte*>(data);
    storage->capacity_ = capacity;
    storage->owner_ = this;
    all_.push_back(storage);
    free_[capacity].reserve(8);
    report_.reserved += capacity;
    ++report_.system_requests;
  }
  storage->bytes_ = bytes;
  storage->purpose_ = purpose;
  storage->references_ = 1;
  const auto p = static_cast<std::size_t>(purpose);
  report_.in_use[p] += bytes;
  report_.peak[p] = std::max(report_.peak[p], report_.in_use[p]);
  total_in_use_ += bytes;
  report_.total_peak = std::max(report_.total_peak, total_in_use_);
  return storage;
}

void Allocator::release(Storage* storage) {
  report_.in_use[static_cast<std::size_t>(storage->purpose_)] -= storage->bytes_;
  total_in_use_ -= storage->bytes_;
  free_[storage->capacity_].push_back(storage);
}

void Allocator::reset_peak() {
  report_.peak = report_.in_use;
  report_.total_peak = total_in_use_;
}

}  // namespace tforge
