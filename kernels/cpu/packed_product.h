#pragma once
// Matrix products of a few dozen rows with a matrix that was packed once for all of them.
//
// Why not BLAS: it packs its operands anew in each call, and the bits of an element depend on the shape of the call.
// Here an element is a sum over k of chains of kDepth fused multiply-adds, in order from k = 0, whatever the shape,
// the threads and the processor; appended factors that are 0 leave it as it is.
#include <algorithm>
#include <cstdint>

#include "kernels/cpu/packing.h"
#include "kernels/cpu/parallel.h"
#include "kernels/cpu/tile.h"

namespace tforge::kernels::cpu {

/// Length of a chain: a panel of this depth stays in the first-level cache.
inline constexpr std::int64_t kDepth = 256;

/// Elements of a packed matrix op(B) [k, n], for either dtype.
constexpr std::int64_t packed_size(std::int64_t k, std::int64_t n) {
  return k * blocks_of(n, kPanelColumns<float>) * kPanelColumns<float>;
}

/// The whole matrix, on all threads.
template <class T>
void pack_matrix(const T* b, std::int64_t b_row, std::int64_t depth, std::int64_t n, T* panels) {
  constexpr std::int64_t kRows = 64;
  parallel_blocks(blocks_of(depth, kRows), [&](std::int64_t block) {
    const std::int64_t first = block * kRows;
    pack_rows(b + first * b_row, b_row, first, std::min(kRows, depth - first), depth, n, panels);
  });
}
template <class T>
void pack_transposed(const T* b, std::int64_t b_row, std::int64_t n, std::int64_t depth, T* panels) {
  constexpr std::int64_t kWidth = kPanelColumns<T>;
  parallel_blocks(blocks_of(n, kWidth), [&](std::int64_t p) {
    pack_transposed_panel(b, b_row, p * kWidth, n, depth, panels + p * depth * kWidth);
  });
}

/// The left operand of a product: element (i, k) is data[i * row + k * column].
template <class T>
struct LeftOperand {
  const T* data;
  std::int64_t row;
  std::int64_t column = 1;
};
/// A packed right operand, from its row 0; `panel` elements from one panel to the next.
template <class T>
struct Panels {
  const T* data;
  std::int64_t panel;
};

/// Asks for `count` elements to be brought near. Returns their end.
template <class T>
const T* prefetch(const T* from, std::int64_t count) {
  constexpr std::int64_t kLine = 64 / static_cast<std::int64_t>(sizeof(T));
  for (std::int64_t i = 0; i < count; i += kLine) __builtin_prefetch(from + i, 0, 2);
  return from + count;
}

/// C [m, n] {=, +=} A [m, k] B [k, n], on the calling thread.
template <class T>
void product(std::int64_t m, std::int64_t n, std::int64_t k, LeftOperand<T> a, Panels<T> b, T* c, std::int64_t c_row,
             GradMode mode) {
  constexpr std::int64_t kWidth = kPanelColumns<T>;
  const TileProduct<T> tile = tile_product<T>();
  if (k == 0 && mode == GradMode::overwrite) {
    for (std::int64_t i = 0; i < m; ++i) std::fill_n(c + i * c_row, n, T(0));
  }
  for (std::int64_t k0 = 0; k0 < k; k0 += kDepth) {
    const std::int64_t depth = std::min(kDepth, k - k0);
    const GradMode step = k0 > 0 ? GradMode::accumulate : mode;
    const auto one_tile = [&](std::int64_t i, std::int64_t j) {
      const std::int64_t rows = std::min(kTileRows, m - i);
      const std::int64_t columns = std::min(kWidth, n - j);
      const T* left = a.data + i * a.row + k0 * a.column;
      const T* right = b.data + j / kWidth * b.panel + k0 * kWidth;
      T* out = c + i * c_row + j;
      if (columns == kWidth) {
        tile(rows, depth, left, a.row, a.column, right, kWidth, out, c_row, step);
        return;
      }
      alignas(64) T whole[kTileRows * kWidth];  // the last panel is wider than what is left of C
      tile(rows, depth, left, a.row, a.column, right, kWidth, whole, kWidth, GradMode::overwrite);
      for (std::int64_t r = 0; r < rows; ++r) {
        for (std::int64_t s = 0; s < columns; ++s) {
          T& target = out[r * c_row + s];
          target = step == GradMode::accumulate ? target + whole[r * kWidth + s] : whole[r * kWidth + s];
        }
      }
    };
    if (a.column == 1) {  // the panel stays in the first-level cache, rows pass by; the next panel is on its way
      const std::int64_t slice = blocks_of(depth, blocks_of(m, kTileRows)) * kWidth;
      for (std::int64_t j = 0; j < n; j += kWidth) {
        const T* next = b.data + (j / kWidth + 1) * b.panel + k0 * kWidth;
        const T* next_end = j + kWidth < n ? next + depth * kWidth : next;
        for (std::int64_t i = 0; i < m; i += kTileRows) {
          next = prefetch(next, std::min(slice, next_end - next));
          one_tile(i, j);
        }
      }
    } else {  // walking down columns is dear: the strip of A stays, panels pass by
      for (std::int64_t i = 0; i < m; i += kTileRows) {
        for (std::int64_t j = 0; j < n; j += kWidth) one_tile(i, j);
      }
    }
  }
}

}  // namespace tforge::kernels::cpu
