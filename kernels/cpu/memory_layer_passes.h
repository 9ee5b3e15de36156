#pragma once
// The inner loops of the Memory Layer, compiled for two processor families with the same bits on both (line_math.inc).
#include <cstdint>

#include "core/device.h"
#include "core/hash_weight.h"

namespace tforge::kernels::cpu {

/// kernels/memory_layer.h's MemoryHash with its matrix spelled out.
template <class T>
struct HashSpec {
  HashWeight weight;
  T minus_two_over_t;
  std::int64_t bits, weight_bits, tables;
  const std::int32_t* coordinates;  // [bits, tables]
  std::int64_t coordinates_row;
};

/// Some tables of a layer, and where rows of text find their codes and weights for them.
template <class T>
struct LookupSpec {
  std::int64_t bits, tables;
  const std::int32_t* codes;
  std::int64_t codes_row;
  const T* weights;
  std::int64_t weights_row;
};

/// Some columns of one row of a table.
template <class T>
struct TableRow {
  const T* value;
  T* gradient;  // null: unwanted
  GradMode mode;
};

template <class T>
struct MemoryPasses {
  /// Columns that `lookup` and `hits` go through at once, for those who cut a matrix into strips.
  std::int64_t strip;

  /// Codes and weights of one row.
  void (*hash)(const HashSpec<T>& hash, const T* x, std::int32_t* codes, T* weights);
  /// dx[coordinate] += dweights[k * dweights_row] dw_k/dz, table by table.
  void (*hash_backward)(const HashSpec<T>& hash, const T* x, const T* dweights, std::int64_t dweights_row, T* dx);

  /// out[i, c] {=, +=} sum_k weights[i, k] table[k 2^bits + codes[i, k], c] for c < columns: one chain in order of k.
  /// `ahead` > 0: the row of the table so many tables ahead is fetched into the cache.
  void (*lookup)(const LookupSpec<T>& spec, std::int64_t rows, const T* table, std::int64_t table_row,
                 std::int64_t columns, GradMode mode, T* out, std::int64_t out_row, std::int64_t ahead);

  /// All rows of text that hit one row of a table, `hit[0] .. hit[hits - 1]`, in order; columns <= strip:
  /// gradient {=, +=} sum weights[t * weights_row] dy[t, :],   dots[t] {=, +=} <dy[t, :], value>  (null: unwanted).
  void (*hits)(std::int64_t hits, const std::int32_t* hit, const T* weights, std::int64_t weights_row, const T* dy,
               std::int64_t dy_row, std::int64_t columns, const TableRow<T>& row, GradMode dots_mode, T* dots);
};

template <class T>
const MemoryPasses<T>& memory_passes_avx2();
template <class T>
const MemoryPasses<T>& memory_passes_avx512();
/// The faster one that this processor has.
template <class T>
const MemoryPasses<T>& memory_passes();

}  // namespace tforge::kernels::cpu
