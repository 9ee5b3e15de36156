#include "kernels/memory_layer.h"

#include <algorithm>
#include <limits>

#include "kernels/check.h"
#include "kernels/cpu/memory_layer.h"
#include "kernels/cuda/memory_layer.h"
#include "kernels/dispatch.h"
#include "kernels/work.h"

namespace tforge::kernels {
namespace {

void check_hash(const char* op, const MemoryHash& hash) {
  const std::int64_t bits = hash.coordinates.rows();
  check_matrix(op, "coordinates", hash.coordinates, DType::i32, bits, hash.coordinates.columns());
  if (bits < 1 || bits > kMostHashBits || hash.weight_bits < 1 || hash.weight_bits > bits) {
    throw ShapeError("{}: {} bits of which the weight looks at {}, want 1 to {} and 1 to as many", op, bits,
                     hash.weight_bits, kMostHashBits);
  }
  if (!(hash.temperature > 0)) throw ShapeError("{}: temperature {}, want more than 0", op, hash.temperature);
}

/// Operands of the lookup that do not depend on the layer.
void check_codes(const char* op, std::int64_t bits, DType dtype, const ConstTensorView& codes,
                 const ConstTensorView& weights, std::size_t layers) {
  check_matrix(op, "codes", codes, DType::i32, codes.rows(), codes.columns());
  check_matrix(op, "weights", weights, dtype, codes.rows(), codes.columns());
  if (bits < 1 || bits > kMostHashBits) throw ShapeError("{}: {} bits, want 1 to {}", op, bits, kMostHashBits);
  if (layers < 1 || layers > kMaxMemoryGroup) {
    throw ShapeError("{}: {} layers in a group, want 1 to {}", op, layers, kMaxMemoryGroup);
  }
}

template <class T>
cuda::HashNumbers<T> numbers_of(const MemoryHash& hash) {
  static_assert(cuda::kMostHashBits == kMostHashBits);
  return {hash.weight, static_cast<T>(-2 / hash.temperature), hash.weight_bits, hash.coordinates};
}

/// Exponentials cost most of a hash.
double hash_flops(const MemoryHash& hash, std::int64_t rows) {
  return 20.0 * static_cast<double>(rows) * static_cast<double>(hash.coordinates.elements());
}

/// Of the rows of `tables` that codes point at, each read once: no more than there are.
double bytes_gathered(const ConstTensorView& codes, const ConstTensorView& tables) {
  const double gathers = static_cast<double>(codes.elements()) * static_cast<double>(tables.columns());
  return std::min(gathers * static_cast<double>(size_of(tables.dtype)), bytes_of(tables));
}

}  // namespace

void memory_hash_forward(Stream& stream, const MemoryHash& hash, ConstTensorView x, TensorView codes,
                         TensorView weights) {
  constexpr const char* kOp = "memory_hash_forward";
  check_device(kOp, stream, hash.coordinates, x, codes, weights);
  check_hash(kOp, hash);
  check_matrix(kOp, "x", x, x.dtype, x.rows(), x.columns());
  check_matrix(kOp, "codes", codes, DType::i32, x.rows(), hash.coordinates.columns());
  check_matrix(kOp, "weights", weights, x.dtype, x.rows(), hash.coordinates.columns());
  const ProfileScope scope(stream, kOp, {hash_flops(hash, x.rows()), bytes_of(x, codes, weights)});
  with_compute_type(kOp, x.dtype, [&](auto t) {
    using T = decltype(t);
    on_device(
        stream, [&] { cpu::memory_hash_forward<T>(hash, x, codes, weights); },
        [&](auto) { cuda::memory_hash_forward<T>(stream, numbers_of<T>(hash), x, codes, weights); });
  });
}

void memory_hash_backward(Stream& stream, const MemoryHash& hash, ConstTensorView x, ConstTensorView dweights,
                          GradMode mode, TensorView dx) {
  constexpr const char* kOp = "memory_hash_backward";
  check_device(kOp, stream, hash.coordinates, x, dweights, dx);
  check_hash(kOp, hash);
  check_matrix(kOp, "x", x, x.dtype, x.rows(), x.columns());
  check_matrix(kOp, "dweights", dweights, x.dtype, hash.coordinates.columns(), x.rows());
  check_matrix(kOp, "dx", dx, x.dtype, x.rows(), x.columns());
  const ProfileScope scope(stream, kOp, {hash_flops(hash, x.rows()), bytes_of(x, dweights) + bytes_written(mode, dx)});
  with_compute_type(kOp, x.dtype, [&](auto t) {
    using T = decltype(t);
    on_device(
        stream, [&] { cpu::memory_hash_backward<T>(hash, x, dweights, mode, dx); },
        [&](auto) { cuda::memory_hash_backward<T>(stream, numbers_of<T>(hash), x, dweights, mode, dx); });
  });
}

void memory_lookup_forward(Stream& stream, std::int64_t bits, ConstTensorView codes, ConstTensorView weights,
                           std::span<const MemoryForward> layers) {
  constexpr const char* kOp = "memory_lookup_forward";
  check_device(kOp, stream, codes, weights);
  check_codes(kOp, bits, weights.dtype, codes, weights, layers.size());
  double columns = 0, moved = 0;
  for (const MemoryForward& l : layers) {
    check_device(kOp, stream, l.tables, l.y);
    check_matrix(kOp, "tables", l.tables, weights.dtype, codes.columns() << bits, l.y.columns());
    check_matrix(kOp, "y", l.y, weights.dtype, codes.rows(), l.y.columns());
    columns += static_cast<double>(l.y.columns());
    moved += bytes_gathered(codes, l.tables) + bytes_of(l.y);
  }
  const double gathered = static_cast<double>(codes.elements()) * columns;
  const ProfileScope scope(stream, kOp, {2 * gathered, moved});
  with_compute_type(kOp, weights.dtype, [&](auto t) {
    using T = decltype(t);
    on_device(
        stream, [&] { cpu::memory_lookup_forward<T>(bits, codes, weights, layers); },
        [&](auto) {
          for (const MemoryForward& l : layers) {
            cuda::memory_lookup_forward<T>(stream, bits, codes, weights, l.tables, l.y);
          }
        });
  });
}

void memory_lookup_backward(Stream& stream, std::int64_t bits, ConstTensorView codes, ConstTensorView weights,
                            std::span<const MemoryBackward> layers, TensorView dweights, TensorView order) {
  constexpr const char* kOp = "memory_lookup_backward";
  check_device(kOp, stream, codes, weights, dweights, order);
  check_codes(kOp, bits, weights.dtype, codes, weights, layers.size());
  if (codes.rows() > std::numeric_limits<std::int32_t>::max()) {
    throw ShapeError("{}: {} rows; positions are 32 bits", kOp, codes.rows());
  }
  double columns = 0, moved = 0;
  for (const MemoryBackward& l : layers) {
    check_device(kOp, stream, l.tables, l.dy, l.dtables);
    check_matrix(kOp, "tables", l.tables, weights.dtype, codes.columns() << bits, l.dy.columns());
    check_matrix(kOp, "dy", l.dy, weights.dtype, codes.rows(), l.dy.columns());
    if (l.dtables) check_matrix(kOp, "dtables", l.dtables, weights.dtype, l.tables.rows(), l.tables.columns());
    columns += static_cast<double>(l.dy.columns());
    moved += bytes_gathered(codes, l.tables) + (l.dtables ? bytes_written(l.dtables_mode, l.dtables) : 0);
  }
  if (dweights) check_matrix(kOp, "dweights", dweights, weights.dtype, codes.columns(), codes.rows());
  check_workspace(kOp, order, DType::i32,
                  memory_lookup_workspace(codes.rows(), bits, codes.columns(), stream.device()));
  const double gathered = static_cast<double>(codes.elements()) * columns;
  const ProfileScope scope(stream, kOp, {4 * gathered, moved});
  with_compute_type(kOp, weights.dtype, [&](auto t) {
    using T = decltype(t);
    on_device(
        stream, [&] { cpu::memory_lookup_backward<T>(bits, codes, weights, layers, dweights, order); },
        [&](auto) {
          cuda::memory_sort(stream, bits, codes, order.as<std::int32_t>());
          GradMode dweights_mode = GradMode::overwrite;
          for (const MemoryBackward& l : layers) {
            if (l.dtables) {
              cuda::memory_table_gradients<T>(stream, bits, order.as<std::int32_t>(), weights, l.dy, l.dtables_mode,
                                              l.dtables);
            }
            if (!dweights) continue;
            cuda::memory_weight_gradients<T>(stream, bits, codes, l.tables, l.dy, dweights_mode, dweights);
            dweights_mode = GradMode::accumulate;
          }
        });
  });
}

std::int64_t memory_lookup_workspace(std::int64_t rows, std::int64_t bits, std::int64_t tables, Device device) {
  if (device == Device::cuda) return cuda::memory_sort_size(rows, bits, tables);
  return cpu::memory_lookup_workspace(rows, bits);
}

}  // namespace tforge::kernels
