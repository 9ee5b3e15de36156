#pragma once
// Sums down the columns of a matrix: of gradients of vectors that every row of it has used.
#include "kernels/cuda/launch.cuh"

namespace tforge::kernels::cuda {

inline constexpr int kTileColumns = 32, kTileRows = 16;

/// For a block of dim3(kTileColumns, kTileRows) threads that has kTileColumns columns: f(t, column, sums) adds what row
/// t gives to kSums sums. The threads of a column share the rows and join in order. Returns the column for the threads
/// that then hold its sums, -1 for the others.
template <int kSums, class T, class F>
__device__ std::int64_t down_columns(std::int64_t rows, std::int64_t columns, const F& f, T (&sums)[kSums]) {
  __shared__ T of_rows[kSums][kTileRows][kTileColumns];
  const std::int64_t column = static_cast<std::int64_t>(blockIdx.x) * kTileColumns + threadIdx.x;
  for (int s = 0; s < kSums; ++s) sums[s] = T(0);
  if (column < columns) {
    for (std::int64_t t = threadIdx.y; t < rows; t += kTileRows) f(t, column, sums);
  }
  for (int s = 0; s < kSums; ++s) of_rows[s][threadIdx.y][threadIdx.x] = sums[s];
  __syncthreads();
  if (threadIdx.y != 0 || column >= columns) return -1;
  for (int s = 0; s < kSums; ++s) {
    for (int i = 1; i < kTileRows; ++i) sums[s] += of_rows[s][i][threadIdx.x];
  }
  return column;
}

inline dim3 column_block() { return dim3(kTileColumns, kTileRows); }

/// y = sum, or y += sum.
template <class T>
__device__ void write(GradMode mode, T sum, T* y) {
  *y = mode == GradMode::accumulate ? *y + sum : sum;
}

}  // namespace tforge::kernels::cuda
