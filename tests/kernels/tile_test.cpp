#include "kernels/cpu/tile.h"

#include <cmath>

#include "matrix.h"

namespace tforge {
namespace {

using namespace kernels::cpu;
using test::Matrix;

/// The chain of fused multiply-adds that tile.h promises.
template <class T>
T chain(const Matrix<T>& a, bool transposed, const Matrix<T>& b, std::int64_t i, std::int64_t j, std::int64_t depth) {
  T sum = 0;
  for (std::int64_t k = 0; k < depth; ++k) sum = std::fma(transposed ? a(k, i) : a(i, k), b(k, j), sum);
  return sum;
}

template <class T>
void expect_chains(TileProduct<T> tile) {
  constexpr std::int64_t kColumns = kPanelColumns<T>;
  for (std::int64_t rows = 1; rows <= kTileRows; ++rows) {
    for (const bool transposed : {false, true}) {
      for (const std::int64_t depth : {std::int64_t{1}, std::int64_t{37}}) {
        const auto a = transposed ? Matrix<T>::random(depth, rows, 1, 1, 5) : Matrix<T>::random(rows, depth, 1, 1, 5);
        const auto b = Matrix<T>::random(depth, kColumns, 2, 1, 3);
        const auto stride = static_cast<std::int64_t>(a.view().row_stride);
        Matrix<T> c(rows, kColumns, 4);
        const auto run = [&](GradMode mode) {
          tile(rows, depth, &a(0, 0), transposed ? 1 : stride, transposed ? stride : 1, &b(0, 0), b.view().row_stride,
               &c(0, 0), c.view().row_stride, mode);
        };
        run(GradMode::overwrite);  // over NaN
        for (std::int64_t i = 0; i < rows; ++i) {
          for (std::int64_t j = 0; j < kColumns; ++j) ASSERT_EQ(c(i, j), chain(a, transposed, b, i, j, depth));
        }
        run(GradMode::accumulate);
        for (std::int64_t i = 0; i < rows; ++i) {
          for (std::int64_t j = 0; j < kColumns; ++j) ASSERT_EQ(c(i, j), 2 * chain(a, transposed, b, i, j, depth));
        }
        ASSERT_TRUE(c.padding_untouched());
      }
    }
  }
}

TEST(Tile, EveryProcessorFamilyGivesTheSameChains) {
  expect_chains(tile_product_avx2<float>());
  expect_chains(tile_product_avx2<double>());
  if (__builtin_cpu_supports("avx512f")) {
    expect_chains(tile_product_avx512<float>());
    expect_chains(tile_product_avx512<double>());
  }
}

}  // namespace
}  // namespace tforge
