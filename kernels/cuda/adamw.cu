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
template <class T>
__global__ void __launch_bounds__(kThreads) update_busy_rows(AdamWNumbers<T> n, Operands<T> x, std::int64_t columns) {
  const std::int64_t begin = blockIdx.x * columns;
  int busy = 0;
  for (std::int64_t c = threadIdx.x; c < columns; c += kThreads) busy |= x.gradient[begin + c] != T(0) ? 1 : 0;
  if (over_block<Largest, kThreads>(busy) == 0) return;
  for (std::int64_t c = threadIdx.x; c < columns; c += kThreads) update_pack<1>(n, x, begin + c);
}

/// Block b adds the elements [b * piece, (b + 1) * piece) of x, row by row.
template <class T>
__global__ void __launch_bounds__(kThreads) add_pieces(Rows<const T> x, std::int64_t piece, double* partial_sums) {
  const std::int64_t begin = blockIdx.x * piece, end = min(x.elements(), begin + piece);
  const bool one_run = x.contiguous();
  double sum = 0;
  for (std::int64_t i = begin + threadIdx.x; i < end; i += kThreads) {
    const auto value = static_cast<double>(one_run ? x.data[i] : x.row(i / x.columns)[i % x.columns]);
    sum += value * value;
  }
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
  if (skips_idle_rows) {
    launch(stream, static_cast<unsigned>(rows), kThreads, 0, update_busy_rows<T>, numbers, x, columns);
    return;
  }
  const auto one_row = [count](auto* data) {
    return Rows<std::remove_pointer_t<decltype(data)>>(data, count, 1, count);
  };
  if (packs<kCount>(one_row(parameter)) && packs<kCount>(one_row(gradient)) && packs<kCount>(one_row(m)) &&
      packs<kCount>(one_row(v))) {
    launch(stream, blocks_for(count, kThreads * kCount), kThreads, 0, update<kCount, T>, numbers, x, count);
  } else {
    launch(stream, blocks_for(count, kThreads), kThreads, 0, update<1, T>, numbers, x, count);
  }
}

template <class T>
void sum_of_squares(const Stream& stream, Rows<const T> x, double* sum, double* partial_sums) {
  constexpr std::int64_t kLeast = 16384;  // elements of a piece
  const std::int64_t count = x.elements();
  const std::int64_t piece = std::max(kLeast, (count + kMostPartialSums - 1) / kMostPartialSums);
  const unsigned pieces = blocks_for(count, piece);
  if (pieces > 0) launch(stream, pieces, kThreads, 0, add_pieces<T>, x, piece, partial_sums);
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
