#pragma once
// CUDA kernels behind kernels/memory_layer.h; operands are already checked. Layers of a group come one after another.
#include <cstdint>

#include "core/device.h"
#include "core/hash_weight.h"
#include "kernels/cuda/rows.h"

namespace tforge::kernels::cuda {

inline constexpr int kMostHashBits = 16;

/// MemoryHash.
template <class T>
struct HashNumbers {
  HashWeight weight;
  T minus_two_over_t;
  std::int64_t weight_bits;
  Rows<const std::int32_t> coordinates;
};

template <class T>
void memory_hash_forward(const Stream& stream, const HashNumbers<T>& hash, Rows<const T> x, Rows<std::int32_t> codes,
                         Rows<T> weights);
template <class T>
void memory_lookup_forward(const Stream& stream, std::int64_t bits, Rows<const std::int32_t> codes,
                           Rows<const T> weights, Rows<const T> tables, Rows<T> y);

/// For each table, one past the last hit of each of its rows, then the rows of text by the row that they hit.
void memory_sort(const Stream& stream, std::int64_t bits, Rows<const std::int32_t> codes, std::int32_t* order);
inline std::int64_t memory_sort_size(std::int64_t rows, std::int64_t bits, std::int64_t tables) {
  return tables * (rows + (std::int64_t{1} << bits));
}
/// `order` is memory_sort's, of dy.rows rows.
template <class T>
void memory_table_gradients(const Stream& stream, std::int64_t bits, const std::int32_t* order, Rows<const T> weights,
                            Rows<const T> dy, GradMode mode, Rows<T> dtables);
template <class T>
void memory_weight_gradients(const Stream& stream, std::int64_t bits, Rows<const std::int32_t> codes,
                             Rows<const T> tables, Rows<const T> dy, GradMode mode, Rows<T> dweights);
/// A row of x fits into the shared memory of a block (DeviceError).
template <class T>
void memory_hash_backward(const Stream& stream, const HashNumbers<T>& hash, Rows<const T> x, Rows<const T> dweights,
                          GradMode mode, Rows<T> dx);

}  // namespace tforge::kernels::cuda
