#pragma once
// The innermost product of the own matrix products: a tile of at most kTileRows rows times one panel of columns.
//
// Each element of the tile is one chain of fused multiply-adds over k, from k = 0, starting at 0; then it is stored or
// added to C. So its bits depend neither on the processor, nor on the sizes of the matrices around it, and a zero
// factor leaves them as they are: what BLAS libraries do not promise.
#include <cstdint>

#include "core/device.h"

namespace tforge::kernels::cpu {

inline constexpr std::int64_t kTileRows = 12;
/// Columns of a panel: two cache lines.
template <class T>
inline constexpr std::int64_t kPanelColumns = 128 / static_cast<std::int64_t>(sizeof(T));

/// C[i, j] {=, +=} sum_k A(i, k) B(k, j) for i < rows <= kTileRows and the kPanelColumns columns of one panel;
/// A(i, k) = a[i * a_row + k * a_k], B(k, j) = b[k * b_k + j].
template <class T>
using TileProduct = void (*)(std::int64_t rows, std::int64_t k, const T* a, std::int64_t a_row, std::int64_t a_k,
                             const T* b, std::int64_t b_k, T* c, std::int64_t c_row, GradMode mode);

/// For any x86-64-v3 processor, and for those with AVX-512: the same bits.
template <class T>
TileProduct<T> tile_product_avx2();
template <class T>
TileProduct<T> tile_product_avx512();

/// The faster one that this processor has.
template <class T>
TileProduct<T> tile_product();

}  // namespace tforge::kernels::cpu
