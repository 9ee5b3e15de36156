#pragma once
// What the forward and the backward pass of Pattention share: how rows are cut into blocks, and what a row's activation
// takes from its statistic.
#include <omp.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <type_traits>

#include "core/pattention_norm.h"
#include "core/tensor.h"
#include "kernels/cpu/parallel.h"
#include "kernels/cpu/tile.h"

namespace tforge::kernels::cpu {

// Sizes of blocks do not show in the results (see packed_product.h), so they may follow the threads.
inline constexpr std::int64_t kMostRows = 11 * kTileRows;  // of a row block: its scores stay in the second-level cache

inline std::int64_t round_up(std::int64_t size, std::int64_t step) { return blocks_of(size, step) * step; }

inline std::int64_t threads() { return omp_get_max_threads(); }

/// Rows of a row block: about as many blocks as give every thread the same work.
inline std::int64_t rows_per_block(std::int64_t rows) {
  if (rows == 0) return kTileRows;
  const std::int64_t blocks = round_up(blocks_of(rows, kMostRows), threads());
  return std::min(round_up(blocks_of(rows, blocks), kTileRows), kMostRows);
}

/// Row pitch of scratch matrices: walking down a column must not meet the same cache set again and again, as a pitch
/// of a power of two does.
inline std::int64_t scratch_pitch(std::int64_t columns) { return round_up(columns, 16) + 16; }

/// A matrix as the kernels below see it; false when it was left out or has no elements.
template <class T>
struct Rows {
  using View = BasicView<std::is_const_v<T>>;
  T* data;
  std::int64_t stride;
  std::int64_t count;
  std::int64_t columns;

  // NOLINTNEXTLINE(google-explicit-constructor): the same matrix with its type known
  Rows(const View& v)
      : data(v ? v.template as<std::remove_const_t<T>>() : nullptr),
        stride(v.row_stride),
        count(v.rows()),
        columns(v.columns()) {}
  explicit operator bool() const { return data != nullptr; }
  T* row(std::int64_t i) const { return data + i * stride; }
};

/// scale / r of an l2_norm_gelu row; 0 when r is below the floor, NaN when it is not finite (divergence must show).
template <class T>
T row_factor(double scale, T stat) {
  const double r = std::sqrt(static_cast<double>(stat));
  if (r < kNormFloor) return T(0);
  return std::isfinite(r) ? static_cast<T>(scale / r) : std::numeric_limits<T>::quiet_NaN();
}

/// What the activation of a row takes from its statistic: the factor of the scores (l2_norm_gelu), the largest score
/// (softmax), nothing (gelu_l2_norm).
template <class T>
T row_parameter(PattentionNorm norm, double scale, const Rows<const T>& stat, std::int64_t row) {
  switch (norm) {
    case PattentionNorm::l2_norm_gelu: return row_factor(scale, *stat.row(row));
    case PattentionNorm::softmax: return *stat.row(row);
    case PattentionNorm::gelu_l2_norm: break;
  }
  return T(0);
}

template <class T>
T* start_of(const TensorView& workspace) {
  return workspace ? workspace.as<T>() : nullptr;
}

}  // namespace tforge::kernels::cpu
