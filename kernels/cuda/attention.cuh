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

/// Over kLanes neighbours in a warp, a power of two; each gets the result.
template <class Fold, int kLanes, class T>
__device__ T over_lanes(T value) {
  for (int distance = kLanes / 2; distance > 0; distance /= 2) {
    value = Fold()(value, __shfl_xor_sync(kAllLanes, value, distance));
  }
  return value;
}

inline constexpr int kDotThreads = 128, kDotLanes = 8;

/// dots[row, head] = sum_c dout out = sum_j P_j dP_j. kDotLanes lanes a row and head; whatever kCount, a lane has the
/// same columns, so that it does not show in sums.
template <int kCount, class T>
__global__ void __launch_bounds__(kDotThreads)
    row_dots(Heads shape, std::int64_t count, Rows<const T> out, Rows<const T> dout, Compute<T>* dots) {
  const std::int64_t i = static_cast<std::int64_t>(blockIdx.x) * (kDotThreads / kDotLanes) + threadIdx.x / kDotLanes;
  const int lane = static_cast<int>(threadIdx.x) % kDotLanes;
  Compute<T> sum = 0;
  if (i < count) {
    const std::int64_t row = i / shape.heads, column = i % shape.heads * shape.head_dim;
    const T *const left = out.row(row) + column, *const right = dout.row(row) + column;
    for (std::int64_t first = lane * kWhole<T>; first < shape.head_dim; first += kDotLanes * kWhole<T>) {
      for (int k = 0; k < kWhole<T> && first + k < shape.head_dim; k += kCount) {
        const auto a = load<kCount>(left + first + k), b = load<kCount>(right + first + k);
        for (int e = 0; e < kCount; ++e) sum += a.element[e] * b.element[e];
      }
    }
  }
  sum = over_lanes<Sum, kDotLanes>(sum);
  if (lane == 0 && i < count) dots[i] = sum;
}

template <class T>
void queue_row_dots(const Stream& stream, const Heads& shape, Rows<const T> out, Rows<const T> dout, Compute<T>* dots) {
  const std::int64_t count = out.rows * shape.heads;
  const bool whole = shape.head_dim % kWhole<T> == 0 && packs<kWhole<T>>(out) && packs<kWhole<T>>(dout);
  launch(stream, blocks_for(count, kDotThreads / kDotLanes, std::int64_t{1} << 31), kDotThreads, 0,
         whole ? row_dots<kWhole<T>, T> : row_dots<1, T>, shape, count, out, dout, dots);
}

}  // namespace tforge::kernels::cuda
