#pragma once
// The tile product, written once for every vector width. Included by one .cpp a processor family, each compiled for
// its family, so everything here has internal linkage and nothing of the standard library is used.
#include "kernels/cpu/tile.h"

namespace tforge::kernels::cpu {
namespace {

/// kRows x (2 vectors), in registers. Rows are addressed in threes from a few pointers, which keeps addresses in
/// registers too.
template <class V, int kRows>
void register_tile(std::int64_t k, const typename V::Scalar* a, std::int64_t a_row, std::int64_t a_k,
                   const typename V::Scalar* b, std::int64_t b_k, typename V::Scalar* c, std::int64_t c_row,
                   GradMode mode) {
  constexpr int kGroups = (kRows + 2) / 3;
  V left[kRows];
  V right[kRows];
  const typename V::Scalar* group[kGroups];
#pragma GCC unroll 12
  for (int i = 0; i < kRows; ++i) left[i] = right[i] = V::zero();
#pragma GCC unroll 4
  for (int g = 0; g < kGroups; ++g) group[g] = a + std::int64_t{3} * g * a_row;
#pragma GCC unroll 12
  for (int i = 0; i < kRows; ++i) {  // C arrives while the sums are made
    __builtin_prefetch(c + i * c_row, 1);
    __builtin_prefetch(c + i * c_row + 2 * V::kLanes - 1, 1);
  }
  for (; k > 0; --k) {
    const V b0 = V::load(b);
    const V b1 = V::load(b + V::kLanes);
    b += b_k;
#pragma GCC unroll 12
    for (int i = 0; i < kRows; ++i) {
      const V factor = V::all(group[i / 3][(i % 3) * a_row]);
      left[i] = V::fma(factor, b0, left[i]);
      right[i] = V::fma(factor, b1, right[i]);
    }
#pragma GCC unroll 4
    for (int g = 0; g < kGroups; ++g) group[g] += a_k;
  }
#pragma GCC unroll 12
  for (int i = 0; i < kRows; ++i) {
    typename V::Scalar* row = c + i * c_row;
    if (mode == GradMode::accumulate) {
      left[i] = V::add(V::load(row), left[i]);
      right[i] = V::add(V::load(row + V::kLanes), right[i]);
    }
    left[i].store(row);
    right[i].store(row + V::kLanes);
  }
}

/// register_tile for 1 .. kMost rows.
template <class V, int kMost>
void some_rows(std::int64_t rows, std::int64_t k, const typename V::Scalar* a, std::int64_t a_row, std::int64_t a_k,
               const typename V::Scalar* b, std::int64_t b_k, typename V::Scalar* c, std::int64_t c_row,
               GradMode mode) {
  if constexpr (kMost > 1) {
    if (rows < kMost) return some_rows<V, kMost - 1>(rows, k, a, a_row, a_k, b, b_k, c, c_row, mode);
  }
  register_tile<V, kMost>(k, a, a_row, a_k, b, b_k, c, c_row, mode);
}

/// The whole tile, cut into what the registers of V hold: kMost rows by two vectors.
template <class V, int kMost>
void tile(std::int64_t rows, std::int64_t k, const typename V::Scalar* a, std::int64_t a_row, std::int64_t a_k,
          const typename V::Scalar* b, std::int64_t b_k, typename V::Scalar* c, std::int64_t c_row, GradMode mode) {
  for (std::int64_t j = 0; j < kPanelColumns<typename V::Scalar>; j += 2 * V::kLanes) {
    for (std::int64_t i = 0; i < rows; i += kMost) {
      const std::int64_t rest = rows - i;
      some_rows<V, kMost>(rest < kMost ? rest : kMost, k, a + i * a_row, a_row, a_k, b + j, b_k, c + i * c_row + j,
                          c_row, mode);
    }
  }
}

}  // namespace
}  // namespace tforge::kernels::cpu
