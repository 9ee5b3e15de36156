#include "kernels/cuda/adamw.h"

#include <algorithm>

#include "kernels/cuda/launch.cuh"

namespace tforge::kernels::cuda {

namespace {

constexpr int kThreads = 256;

/// What an update reads and writes.
template <class T>
struct Operands {
  T* parameter;
  const T* gradient;
  T *first, *second;
};

template <int kCount, class T>
__device__ void update_pack(const AdamWNumbers<T>& n, const Operands<T>& x, std::int64_t i) {
  auto p = load<kCount>(x.parameter + i);
  auto m = load<kCount>(x.first + i);
  auto v = load<kCount>(x.second + i);
  const auto g = load<kCount>(x.gradient + i);
  for (int k = 0; k < kCount; ++k) {
    const T gi = n.grad_scale * g.element[k];
    m.element[k] = n.beta1 * m.element[k] + n.one_minus_beta1 * gi;
    v.element[k] = n.beta2 * v.element[k] + n.one_minus_beta2 * (gi * gi);
    p.element[k] -=
        n.decay * p.element[k] + n.rate * m.element[k] / (sqrt(v.element[k]) * n.inverse_root_bias2 + n.eps);
  }
  store<kCount>(x.first + i, m);
  store<kCount>(x.second + i, v);
  store<kCount>(x.parameter + i, p);
}

template <int kCount, class T>
__global__ void __launch_bounds__(kThreads) update(AdamWNumbers<T> n, Operands<T> x, std::int64_t count) {
  const std::int64_t step = static_cast<std::int64_t>(gridDim.x) * kThreads * kCount;
  const std::int64_t begin = (static_cast<std::int64_t>(blockIdx.x) * kThreads + threadIdx.x) * kCount;
  for (std::int64_t i = begin; i < count; i += step) update_pack<kCount>(n, x, i);
}

/// Rows whose gradient is 0 stay as they are. A block has one row.
template <int kCount, class T>
__global__ void __launch_bounds__(kThreads) update_busy_rows(AdamWNumbers<T> n, Operands<T> x, std::int64_t columns) {
  const std::int64_t begin = blockIdx.x * columns;
  int busy = 0;
  over_row<T, kCount, kThreads>(columns, [&](std::int64_t c) {
    const auto g = load<kCount>(x.gradient + begin + c);
    for (int k = 0; k < kCount; ++k) busy |= g.element[k] != T(0) ? 1 : 0;
  });
  if (over_block<Largest, kThreads>(busy) == 0) return;
  over_row<T, kCount, kThreads>(columns, [&](std::int64_t c) { update_pack<kCount>(n, x, begin + c); });
}

/// Block b adds the elements [b * piece, (b + 1) * piece) of x, row by row.
template <int kCount, class T>
__global__ void __launch_bounds__(kThreads) add_pieces(Rows<const T> x, std::int64_t piece, double* partial_sums) {
  const std::int64_t begin = blockIdx.x * piece, end = min(x.elements(), begin + piece);
  const bool one_run = x.contiguous();
  double sum = 0;
  over_row<T, kCount, kThreads>(end - begin, [&](std::int64_t c) {
    const std::int64_t i = begin + c;
    const auto a = load<kCount>(one_run ? x.data + i : x.row(i / x.columns) + i % x.columns);
    for (int k = 0; k < kCount; ++k) {
      const auto value = static_cast<double>(a.element[k]);
      sum += value * value;
    }
  });
  sum = over_block<Sum, kThreads>(sum);
  if (threadIdx.x == 0) partial_sums[blockIdx.x] = sum;
}

__global__ void __launch_bounds__(kThreads)
    add_partial_sums(const double* partial_sums, std::int64_t count, double* total) {
  double sum = 0;
  for (std::int64_t i = threadIdx.x; i < count; i += kThreads) sum += partial_sums[i];
  sum = over_block<Sum, kThreads>(sum);
  if (threadIdx.x == 0) *total = sum;
}

}  // namespace

template <class T>
void adamw_update(const Stream& stream, const AdamWNumbers<T>& numbers, T* parameter, const T* gradient, T* m, T* v,
                  std::int64_t rows, std::int64_t columns, bool skips_idle_rows) {
  constexpr int kCount = kWhole<T>;
  const std::int64_t count = rows * columns;
  if (count == 0) return;
  const Operands<T> x{parameter, gradient, m, v};
  const auto whole = [&](std::int64_t of_rows, std::int64_t of_columns) {
    const auto fits = [&](auto* data) {
      return packs<kCount>(Rows<std::remove_pointer_t<decltype(data)>>(data, of_columns, of_rows, of_columns));
    };
    return fits(parameter) && fits(gradient) && fits(m) && fits(v);
  };
  if (skips_idle_rows) {
    launch(stream, static_cast<unsigned>(rows), row_threads<T>(columns, kThreads), 0,
           whole(rows, columns) ? update_busy_rows<kCount, T> : update_busy_rows<1, T>, numbers, x, columns);
  } else if (whole(1, count)) {
    launch(stream, blocks_for(count, kThreads * kCount), kThreads, 0, update<kCount, T>, numbers, x, count);
  } else {
    launch(stream, blocks_for(count, kThreads), kThreads, 0, update<1, T>, numbers, x, count);
  }
}

template <class T>
void sum_of_squares(const Stream& stream, Rows<const T> x, double* sum, double* partial_sums) {
  constexpr std::int64_t kLeast = 16384;  // elements of a piece
  constexpr int kCount = kWhole<T>;
  const std::int64_t count = x.elements();
  if (x.contiguous()) x = {x.data, count, 1, count};
  // Whole packs in every piece, whether x is read in packs or not, so that it does not show.
  const std::int64_t even = (count + kMostPartialSums - 1) / kMostPartialSums;
  const std::int64_t piece = std::max(kLeast, (even + kCount - 1) / kCount * kCount);
  const unsigned pieces = blocks_for(count, piece);
  if (pieces > 0) {
    launch(stream, pieces, kThreads, 0, packs<kCount>(x) ? add_pieces<kCount, T> : add_pieces<1, T>, x, piece,
           partial_sums);
  }
  launch(stream, 1, kThreads, 0, add_partial_sums, partial_sums, pieces, sum);
}

#define TFORGE_INSTANTIATE(T)                                                                              \
  template void adamw_update<T>(const Stream&, const AdamWNumbers<T>&, T*, const T*, T*, T*, std::int64_t, \
                                std::int64_t, bool);                                                       \
  template void sum_of_squares<T>(const Stream&, Rows<const T>, double*, double*)
TFORGE_INSTANTIATE(float);
TFORGE_INSTANTIATE(double);
#undef TFORGE_INSTANTIATE

}  // namespace tforge::kernels::cuda
