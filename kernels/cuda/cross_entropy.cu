#include "kernels/cuda/cross_entropy.h"

#include <limits>

#include "kernels/cuda/launch.cuh"

namespace tforge::kernels::cuda {

namespace {

constexpr int kThreads = 256;        // a block has one row
constexpr int kTermsInOneSum = 128;  // of a thread, before they join an f64 sum

/// Calls f(pack, c) for the packs of a row that are this thread's, c being the first column.
template <int kCount, class T, class F>
__device__ void packs_of_row(T* row, std::int64_t columns, const F& f) {
  over_row<std::remove_const_t<T>, kCount, kThreads>(columns, [&](std::int64_t c) { f(load<kCount>(row + c), c); });
}

/// A thread's sum is taken relative to a logit of its own that is less than this below its largest: seldom does another
/// take its place, and exp(kSlack) is as exact as 1.
constexpr int kSlack = 8;

template <int kCount, class T>
__global__ void __launch_bounds__(kThreads)
    row_statistics_kernel(Rows<const T> logits, const std::int32_t* targets, std::int64_t first_column, Rows<T> row_max,
                          Rows<T> row_sum, Rows<T> target_logit) {
  const std::int64_t r = blockIdx.x;
  T most = -std::numeric_limits<T>::infinity(), shift = std::numeric_limits<T>::lowest(), sum = 0;
  double total = 0;
  int terms = 0;
  packs_of_row<kCount>(logits.row(r), logits.columns, [&](const auto& z, std::int64_t) {
    for (int k = 0; k < kCount; ++k) {
      most = Largest()(most, z.element[k]);
      if (z.element[k] > shift + kSlack) {
        const T smaller = exp(shift - z.element[k]);
        sum *= smaller;
        total *= static_cast<double>(smaller);
        shift = z.element[k];
      }
      sum += exp(z.element[k] - shift);
    }
    terms += kCount;
    if (terms < kTermsInOneSum) return;
    total += static_cast<double>(sum);
    sum = 0;
    terms = 0;
  });
  total += static_cast<double>(sum);
  most = over_block<Largest, kThreads>(most);
  // A thread without columns has no logit to be relative to.
  const double to_most = total == 0 ? 0 : static_cast<double>(exp(shift - most));
  total = over_block<Sum, kThreads>(total * to_most);
  if (threadIdx.x != 0) return;
  const std::int64_t column = targets[r] - first_column;
  const bool held = targets[r] >= 0 && column >= 0 && column < logits.columns;
  *row_max.row(r) = most;
  *row_sum.row(r) = static_cast<T>(total);
  *target_logit.row(r) = held ? logits.row(r)[column] : T(0);
}

template <class T>
__global__ void __launch_bounds__(kThreads)
    rescale_kernel(Rows<const T> own_max, Rows<const T> row_max, Rows<T> row_sum) {
  const std::int64_t r = static_cast<std::int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (r < row_sum.rows) *row_sum.row(r) *= exp(*own_max.row(r) - *row_max.row(r));
}

template <class T>
__global__ void __launch_bounds__(kThreads)
    nll_kernel(Rows<const T> row_max, Rows<const T> row_sum, Rows<const T> target_logit, const std::int32_t* targets,
               std::int64_t count, double* nll) {
  const std::int64_t r = static_cast<std::int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (r >= count) return;
  const double shifted = static_cast<double>(*row_max.row(r)) - static_cast<double>(*target_logit.row(r));
  nll[r] = targets[r] < 0 ? 0.0 : log(static_cast<double>(*row_sum.row(r))) + shifted;
}

template <int kCount, class T, class Out>
__global__ void __launch_bounds__(kThreads)
    backward_kernel(Rows<const T> row_max, Rows<const T> row_sum, const std::int32_t* targets,
                    std::int64_t first_column, double weight, Rows<const T> logits, Rows<Out> dlogits) {
  const std::int64_t r = blockIdx.x;
  const bool counts = targets[r] >= 0;
  const std::int64_t column = targets[r] - first_column;
  const T shift = *row_max.row(r), factor = static_cast<T>(weight / static_cast<double>(*row_sum.row(r)));
  packs_of_row<kCount>(logits.row(r), logits.columns, [&](auto z, std::int64_t c) {
    for (int k = 0; k < kCount; ++k) {
      const T gradient = factor * exp(z.element[k] - shift);
      z.element[k] = !counts ? T(0) : c + k == column ? gradient - static_cast<T>(weight) : gradient;
    }
    store<kCount>(dlogits.row(r) + c, z);
  });
}

unsigned grid_of(std::int64_t rows) { return static_cast<unsigned>(rows); }

}  // namespace

template <class T>
void cross_entropy_row_statistics(const Stream& stream, Rows<const T> logits, const std::int32_t* targets,
                                  std::int64_t first_column, Rows<T> row_max, Rows<T> row_sum, Rows<T> target_logit) {
  constexpr int kCount = kWhole<T>;
  if (logits.rows == 0) return;
  launch(stream, grid_of(logits.rows), kThreads, 0,
         packs<kCount>(logits) ? row_statistics_kernel<kCount, T> : row_statistics_kernel<1, T>, logits, targets,
         first_column, row_max, row_sum, target_logit);
}

template <class T>
void cross_entropy_rescale(const Stream& stream, Rows<const T> own_max, Rows<const T> row_max, Rows<T> row_sum) {
  if (row_sum.rows == 0) return;
  launch(stream, blocks_for(row_sum.rows, kThreads), kThreads, 0, rescale_kernel<T>, own_max, row_max, row_sum);
}

template <class T>
void cross_entropy_nll(const Stream& stream, Rows<const T> row_max, Rows<const T> row_sum, Rows<const T> target_logit,
                       const std::int32_t* targets, std::int64_t count, double* nll) {
  if (count == 0) return;
  launch(stream, blocks_for(count, kThreads), kThreads, 0, nll_kernel<T>, row_max, row_sum, target_logit, targets,
         count, nll);
}

template <class T, class Out>
void cross_entropy_backward(const Stream& stream, Rows<const T> row_max, Rows<const T> row_sum,
                            const std::int32_t* targets, std::int64_t first_column, double weight, Rows<const T> logits,
                            Rows<Out> dlogits) {
  constexpr int kCount = kWhole<T>;
  if (logits.elements() == 0) return;
  const bool whole = packs<kCount>(logits) && packs<kCount>(dlogits);
  launch(stream, grid_of(logits.rows), kThreads, 0,
         whole ? backward_kernel<kCount, T, Out> : backward_kernel<1, T, Out>, row_max, row_sum, targets, first_column,
         weight, logits, dlogits);
}

#define TFORGE_INSTANTIATE_BACKWARD(T, Out)                                                                      \
  template void cross_entropy_backward<T, Out>(const Stream&, Rows<const T>, Rows<const T>, const std::int32_t*, \
                                               std::int64_t, double, Rows<const T>, Rows<Out>)
#define TFORGE_INSTANTIATE(T)                                                                                         \
  template void cross_entropy_row_statistics<T>(const Stream&, Rows<const T>, const std::int32_t*, std::int64_t,      \
                                                Rows<T>, Rows<T>, Rows<T>);                                           \
  template void cross_entropy_rescale<T>(const Stream&, Rows<const T>, Rows<const T>, Rows<T>);                       \
  template void cross_entropy_nll<T>(const Stream&, Rows<const T>, Rows<const T>, Rows<const T>, const std::int32_t*, \
                                     std::int64_t, double*);                                                          \
  TFORGE_INSTANTIATE_BACKWARD(T, T)
TFORGE_INSTANTIATE(float);
TFORGE_INSTANTIATE(double);
TFORGE_INSTANTIATE_BACKWARD(float, bf16);
#undef TFORGE_INSTANTIATE
#undef TFORGE_INSTANTIATE_BACKWARD

}  // namespace tforge::kernels::cuda
