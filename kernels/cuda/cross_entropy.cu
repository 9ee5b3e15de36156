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

template <int kCount, class T>
__global__ void __launch_bounds__(kThreads) row_max_kernel(Rows<const T> logits, Rows<T> row_max) {
  T most = -std::numeric_limits<T>::infinity();
  packs_of_row<kCount>(logits.row(blockIdx.x), logits.columns, [&](const auto& z, std::int64_t) {
    for (int k = 0; k < kCount; ++k) most = Largest()(most, z.element[k]);
  });
  most = over_block<Largest, kThreads>(most);
  if (threadIdx.x == 0) *row_max.row(blockIdx.x) = most;
}

template <int kCount, class T>
__global__ void __launch_bounds__(kThreads)
    row_sum_kernel(Rows<const T> logits, Rows<const T> row_max, const std::int32_t* targets, std::int64_t first_column,
                   Rows<T> row_sum, Rows<T> target_logit) {
  const std::int64_t r = blockIdx.x;
  const T shift = *row_max.row(r);
  double total = 0;
  T sum = 0;
  int terms = 0;
  packs_of_row<kCount>(logits.row(r), logits.columns, [&](const auto& z, std::int64_t) {
    for (int k = 0; k < kCount; ++k) sum += exp(z.element[k] - shift);
    terms += kCount;
    if (terms < kTermsInOneSum) return;
    total += static_cast<double>(sum);
    sum = 0;
    terms = 0;
  });
  total = over_block<Sum, kThreads>(total + static_cast<double>(sum));
  if (threadIdx.x != 0) return;
  const std::int64_t column = targets[r] - first_column;
  const bool held = targets[r] >= 0 && column >= 0 && column < logits.columns;
  *row_sum.row(r) = static_cast<T>(total);
  *target_logit.row(r) = held ? logits.row(r)[column] - shift : T(0);
}

template <class T>
__global__ void __launch_bounds__(kThreads) nll_kernel(Rows<const T> row_sum, Rows<const T> target_logit,
                                                       const std::int32_t* targets, std::int64_t count, double* nll) {
  const std::int64_t r = static_cast<std::int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (r >= count) return;
  nll[r] = targets[r] < 0 ? 0.0 : log(static_cast<double>(*row_sum.row(r))) - static_cast<double>(*target_logit.row(r));
}

template <int kCount, class T>
__global__ void __launch_bounds__(kThreads)
    backward_kernel(Rows<const T> row_max, Rows<const T> row_sum, const std::int32_t* targets,
                    std::int64_t first_column, double weight, Rows<T> logits) {
  const std::int64_t r = blockIdx.x;
  const bool counts = targets[r] >= 0;
  const std::int64_t column = targets[r] - first_column;
  const T shift = *row_max.row(r), factor = static_cast<T>(weight / static_cast<double>(*row_sum.row(r)));
  packs_of_row<kCount>(logits.row(r), logits.columns, [&](auto z, std::int64_t c) {
    for (int k = 0; k < kCount; ++k) {
      const T gradient = factor * exp(z.element[k] - shift);
      z.element[k] = !counts ? T(0) : c + k == column ? gradient - static_cast<T>(weight) : gradient;
    }
    store<kCount>(logits.row(r) + c, z);
  });
}

unsigned grid_of(std::int64_t rows) { return static_cast<unsigned>(rows); }

}  // namespace

template <class T>
void cross_entropy_row_max(const Stream& stream, Rows<const T> logits, Rows<T> row_max) {
  constexpr int kCount = kWhole<T>;
  if (logits.rows == 0) return;
  launch(stream, grid_of(logits.rows), kThreads, 0,
         packs<kCount>(logits) ? row_max_kernel<kCount, T> : row_max_kernel<1, T>, logits, row_max);
}

template <class T>
void cross_entropy_row_sum(const Stream& stream, Rows<const T> logits, Rows<const T> row_max,
                           const std::int32_t* targets, std::int64_t first_column, Rows<T> row_sum,
                           Rows<T> target_logit) {
  constexpr int kCount = kWhole<T>;
  if (logits.rows == 0) return;
  launch(stream, grid_of(logits.rows), kThreads, 0,
         packs<kCount>(logits) ? row_sum_kernel<kCount, T> : row_sum_kernel<1, T>, logits, row_max, targets,
         first_column, row_sum, target_logit);
}

template <class T>
void cross_entropy_nll(const Stream& stream, Rows<const T> row_sum, Rows<const T> target_logit,
                       const std::int32_t* targets, std::int64_t count, double* nll) {
  if (count == 0) return;
  launch(stream, blocks_for(count, kThreads), kThreads, 0, nll_kernel<T>, row_sum, target_logit, targets, count, nll);
}

template <class T>
void cross_entropy_backward(const Stream& stream, Rows<const T> row_max, Rows<const T> row_sum,
                            const std::int32_t* targets, std::int64_t first_column, double weight, Rows<T> logits) {
  constexpr int kCount = kWhole<T>;
  if (logits.elements() == 0) return;
  launch(stream, grid_of(logits.rows), kThreads, 0,
         packs<kCount>(logits) ? backward_kernel<kCount, T> : backward_kernel<1, T>, row_max, row_sum, targets,
         first_column, weight, logits);
}

#define TFORGE_INSTANTIATE(T)                                                                                        \
  template void cross_entropy_row_max<T>(const Stream&, Rows<const T>, Rows<T>);                                     \
  template void cross_entropy_row_sum<T>(const Stream&, Rows<const T>, Rows<const T>, const std::int32_t*,           \
                                         std::int64_t, Rows<T>, Rows<T>);                                            \
  template void cross_entropy_nll<T>(const Stream&, Rows<const T>, Rows<const T>, const std::int32_t*, std::int64_t, \
                                     double*);                                                                       \
  template void cross_entropy_backward<T>(const Stream&, Rows<const T>, Rows<const T>, const std::int32_t*,          \
                                          std::int64_t, double, Rows<T>)
TFORGE_INSTANTIATE(float);
TFORGE_INSTANTIATE(double);
#undef TFORGE_INSTANTIATE

}  // namespace tforge::kernels::cuda
