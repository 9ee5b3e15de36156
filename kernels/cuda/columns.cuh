#pragma once
// Sums down the columns of a matrix: of gradients of vectors that every row of it has used.
#include "kernels/cuda/launch.cuh"

namespace tforge::kernels::cuda {

/// A block has a strip of two packs: 32 bytes are what memory is read in. So a matrix of a model's width still has a
/// block for every second or third multiprocessor, each of which has as many loads under way as it can.
inline constexpr int kStripPacks = 2, kStripThreads = 1024;

template <class T>
unsigned strips_of(std::int64_t columns) {
  return blocks_for(columns, kStripPacks * kWhole<T>);
}

/// For a block of kStripThreads threads: f(t, c, sums) adds what row t gives for the kCount columns from c on to kSums
/// sums of each, sums[s][k]; result(s, column, sum) gets each sum from one thread. A thread has the same rows and
/// columns whatever kCount; their sums join in one order.
template <int kSums, int kCount, class T, class F, class Result>
__device__ void down_columns(std::int64_t rows, std::int64_t columns, const F& f, const Result& result) {
  constexpr int kColumns = kStripPacks * kWhole<T>, kWarps = kStripThreads / kWarp;
  __shared__ Compute<T> of_warp[kWarps][kSums * kColumns];
  const int thread = static_cast<int>(threadIdx.x), pack = thread % kStripPacks * kWhole<T>;
  const std::int64_t strip = static_cast<std::int64_t>(blockIdx.x) * kColumns;
  for (int k = 0; k < kWhole<T>; k += kCount) {
    Compute<T> sums[kSums][kCount] = {};
    const std::int64_t column = strip + pack + k;
    if (column < columns) {
      for (std::int64_t t = thread / kStripPacks; t < rows; t += kStripThreads / kStripPacks) f(t, column, sums);
    }
    for (int s = 0; s < kSums; ++s) {
      for (int j = 0; j < kCount; ++j) {
        Compute<T> sum = sums[s][j];
        for (int distance = kWarp / 2; distance >= kStripPacks; distance /= 2) {
          sum += __shfl_xor_sync(kAllLanes, sum, distance);
        }
        if (thread % kWarp < kStripPacks) of_warp[thread / kWarp][s * kColumns + pack + k + j] = sum;
      }
    }
  }
  __syncthreads();
  if (thread >= kSums * kColumns || strip + thread % kColumns >= columns) return;
  Compute<T> sum = of_warp[0][thread];
  for (int warp = 1; warp < kWarps; ++warp) sum += of_warp[warp][thread];
  result(thread / kColumns, strip + thread % kColumns, sum);
}

/// y = sum, or y += sum.
template <class T>
__device__ void write(GradMode mode, T sum, T* y) {
  *y = mode == GradMode::accumulate ? *y + sum : sum;
}

}  // namespace tforge::kernels::cuda
