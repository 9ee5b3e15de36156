#include "parallel/checks.h"

#include <algorithm>
#include <numeric>

#include "core/errors.h"

namespace tforge::checks {

void on_host(const char* verb, const ConstTensorView& x) {
  if (x.device != Device::cpu) throw DeviceError("{}: MPI communicates from the memory of the CPU alone", verb);
}

void sendable(const char* verb, const ConstTensorView& x) {
  if (!x.contiguous()) {
    throw ShapeError("{}: a view of shape {} with rows {} elements apart is not contiguous", verb, x.shape.text(),
                     x.row_stride);
  }
}

void floating(const char* verb, DType dtype) {
  if (dtype != DType::f32 && dtype != DType::f64) {
    throw DTypeError("{}: adds f32 or f64, not {}", verb, name_of(dtype));
  }
}

void blocks(const char* verb, const ConstTensorView& mine, const ConstTensorView& all,
            std::span<const std::int64_t> counts, int rank, int size) {
  sendable(verb, mine);
  sendable(verb, all);
  if (mine.dtype != all.dtype) {
    throw DTypeError("{}: one operand is {}, the other {}", verb, name_of(mine.dtype), name_of(all.dtype));
  }
  if (counts.size() != static_cast<std::size_t>(size)) {
    throw ShapeError("{}: {} counts for {} ranks", verb, counts.size(), size);
  }
  if (std::ranges::any_of(counts, [](std::int64_t n) { return n < 0; })) {
    throw ShapeError("{}: a count is negative", verb);
  }
  const std::int64_t own = counts[static_cast<std::size_t>(rank)];
  const std::int64_t total = std::accumulate(counts.begin(), counts.end(), std::int64_t{0});
  if (mine.elements() != own || all.elements() != total) {
    throw ShapeError("{}: the counts want {} elements of this rank and {} of all, the views hold {} and {}", verb, own,
                     total, mine.elements(), all.elements());
  }
}

void root(const char* verb, int root, int size) {
  if (root < 0 || root >= size) throw InternalError("{}: root {} of {} ranks", verb, root, size);
}

}  // namespace tforge::checks
