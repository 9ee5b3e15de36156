#pragma once
// What the kernels of attention share, whatever their dtype.
#include <cmath>
#include <cstdint>

#include "kernels/cuda/attention.h"
#include "kernels/cuda/launch.cuh"

namespace tforge::kernels::cuda {

/// The rows of one head of one sequence: element (i, c) is data[i * stride + c].
template <class T>
struct Head {
  T* data;
  std::int64_t stride;
};
template <class T>
__device__ Head<T> head_of(const Rows<T>& m, std::int64_t first_row, std::int64_t column) {
  return {m.row(first_row) + column, m.stride};
}

/// Which rows of which head a block has: those of one tile.
struct Work {
  std::int64_t sequence, head, first;
  __device__ Work(const Heads& s, std::int64_t first_row)
      : sequence(blockIdx.y / s.heads), head(blockIdx.y % s.heads), first(first_row) {}
};

inline dim3 grid_of(const Heads& s, std::int64_t rows, int tile) {
  return dim3(static_cast<unsigned>((rows + tile - 1) / tile), static_cast<unsigned>(s.batch * s.heads));
}

template <class T>
T score_scale(const Heads& shape) {
  return static_cast<T>(1 / std::sqrt(static_cast<double>(shape.head_dim)));
}

inline constexpr int kDotThreads = 128;

/// dots[row, head] = sum_c dout out = sum_j P_j dP_j. One warp a row and head.
template <class T>
__global__ void __launch_bounds__(kDotThreads)
    row_dots(Heads shape, std::int64_t count, Rows<const T> out, Rows<const T> dout, Compute<T>* dots) {
  const std::int64_t i = static_cast<std::int64_t>(blockIdx.x) * (kDotThreads / kWarp) + threadIdx.x / kWarp;
  if (i >= count) return;
  const std::int64_t row = i / shape.heads, column = i % shape.heads * shape.head_dim;
  Compute<T> sum = 0;
  for (std::int64_t c = threadIdx.x % kWarp; c < shape.head_dim; c += kWarp) {
    sum += computed(out.row(row)[column + c]) * computed(dout.row(row)[column + c]);
  }
  sum = over_warp<Sum>(sum);
  if (threadIdx.x % kWarp == 0) dots[i] = sum;
}

template <class T>
void queue_row_dots(const Stream& stream, const Heads& shape, Rows<const T> out, Rows<const T> dout, Compute<T>* dots) {
  const std::int64_t count = out.rows * shape.heads;
  launch(stream, blocks_for(count, kDotThreads / kWarp, std::int64_t{1} << 31), kDotThreads, 0, row_dots<T>, shape,
         count, out, dout, dots);
}

}  // namespace tforge::kernels::cuda
