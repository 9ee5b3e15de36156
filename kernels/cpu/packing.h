#pragma once
// The packed form of the right operand of a product: panels of kPanelColumns columns, each row by row (tile.h).
#include <immintrin.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "kernels/cpu/tile.h"

namespace tforge::kernels::cpu {

/// to[k * to_row + r] = from[r * from_row + k] for an 8 x 8 block, in registers.
inline void transpose_8x8(const float* from, std::int64_t from_row, float* to, std::int64_t to_row) {
  __m256 r[8], s[8];
#pragma GCC unroll 8
  for (int i = 0; i < 8; ++i) r[i] = _mm256_loadu_ps(from + i * from_row);
#pragma GCC unroll 4
  for (int i = 0; i < 8; i += 2) {
    s[i] = _mm256_unpacklo_ps(r[i], r[i + 1]);
    s[i + 1] = _mm256_unpackhi_ps(r[i], r[i + 1]);
  }
#pragma GCC unroll 2
  for (int i = 0; i < 8; i += 4) {
    r[i] = _mm256_shuffle_ps(s[i], s[i + 2], 0x44);
    r[i + 1] = _mm256_shuffle_ps(s[i], s[i + 2], 0xee);
    r[i + 2] = _mm256_shuffle_ps(s[i + 1], s[i + 3], 0x44);
    r[i + 3] = _mm256_shuffle_ps(s[i + 1], s[i + 3], 0xee);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    _mm256_storeu_ps(to + i * to_row, _mm256_permute2f128_ps(r[i], r[i + 4], 0x20));
    _mm256_storeu_ps(to + (i + 4) * to_row, _mm256_permute2f128_ps(r[i], r[i + 4], 0x31));
  }
}

/// Packs rows [first, first + count) of a row-major B [depth, n] into panels: panel p holds its columns
/// [p * W, (p + 1) * W) row by row, 0 past n; panels are depth * W elements apart.
template <class T>
void pack_rows(const T* b, std::int64_t b_row, std::int64_t first, std::int64_t count, std::int64_t depth,
               std::int64_t n, T* panels) {
  constexpr std::int64_t kWidth = kPanelColumns<T>;
  for (std::int64_t j = 0; j < n; j += kWidth, panels += depth * kWidth) {
    const std::int64_t columns = std::min(kWidth, n - j);
    for (std::int64_t i = 0; i < count; ++i) {
      const T* from = b + i * b_row + j;
      T* to = panels + (first + i) * kWidth;
      if (columns == kWidth) {
        std::memcpy(to, from, kWidth * sizeof(T));  // of a length known to the compiler: no call
      } else {
        std::fill_n(std::copy_n(from, columns, to), kWidth - columns, T(0));
      }
    }
  }
}

/// One panel (columns [first, first + W)) of the transpose of a row-major matrix [n, depth]; 0 past column n.
template <class T>
void pack_transposed_panel(const T* b, std::int64_t b_row, std::int64_t first, std::int64_t n, std::int64_t depth,
                           T* panel) {
  constexpr std::int64_t kWidth = kPanelColumns<T>;
  const std::int64_t columns = std::min(kWidth, n - first);
  const T* from = b + first * b_row;
  std::int64_t k = 0;
  if constexpr (std::is_same_v<T, float>) {
    for (; columns == kWidth && k + 8 <= depth; k += 8) {
      for (std::int64_t j = 0; j < kWidth; j += 8) {
        transpose_8x8(from + j * b_row + k, b_row, panel + k * kWidth + j, kWidth);
      }
    }
  }
  for (; k < depth; ++k) {
    for (std::int64_t j = 0; j < kWidth; ++j) panel[k * kWidth + j] = j < columns ? from[j * b_row + k] : T(0);
  }
}

}  // namespace tforge::kernels::cpu
