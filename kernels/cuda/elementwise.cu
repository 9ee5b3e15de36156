#include "kernels/cuda/elementwise.h"

#include "kernels/cuda/columns.cuh"
#include "kernels/cuda/map.cuh"

namespace tforge::kernels::cuda {

namespace {

struct Same {
  template <class T>
  __device__ T operator()(T x) const {
    return x;
  }
};
template <class T>
struct Times {
  T alpha;
  __device__ T operator()(T x) const { return alpha * x; }
};
/// NaN wins.
struct LargestOrNaN {
  template <class T>
  __device__ T operator()(T a, T b) const {
    return a < b || b != b ? b : a;
  }
};

constexpr int kThreads = 256;

/// Each element of y is read, as one of the parts perhaps, before it is written.
template <class T, class Fold>
__global__ void fold_parts(Parts<T> parts, Fold fold, T* y, std::int64_t count) {
  const std::int64_t step = static_cast<std::int64_t>(gridDim.x) * kThreads;
  for (std::int64_t i = static_cast<std::int64_t>(blockIdx.x) * kThreads + threadIdx.x; i < count; i += step) {
    T value = parts.data[0][i];
    for (int p = 1; p < parts.count; ++p) value = fold(value, parts.data[p][i]);
    y[i] = value;
  }
}

template <class T, class Fold>
void fold_in_order(const Stream& stream, const Parts<T>& parts, Fold fold, T* y, std::int64_t count) {
  if (count == 0) return;
  launch(stream, blocks_for(count, kThreads, 1 << 14), kThreads, 0, fold_parts<T, Fold>, parts, fold, y, count);
}

template <class T>
__global__ void __launch_bounds__(kThreads) fill_kernel(Rows<T> y, T value) {
  const std::int64_t step = static_cast<std::int64_t>(gridDim.x) * kThreads;
  const std::int64_t first = static_cast<std::int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  for (std::int64_t r = blockIdx.y; r < y.rows; r += gridDim.y) {
    for (std::int64_t c = first; c < y.columns; c += step) y.row(r)[c] = value;
  }
}

template <class T>
__global__ void __launch_bounds__(kThreads) add_row_kernel(const Compute<T>* row, Rows<T> y) {
  const std::int64_t c = static_cast<std::int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (c >= y.columns) return;
  for (std::int64_t r = blockIdx.y; r < y.rows; r += gridDim.y) {
    y.row(r)[c] = stored<T>(computed(y.row(r)[c]) + row[c]);
  }
}

template <int kCount, class T>
__global__ void __launch_bounds__(kStripThreads) column_sums_kernel(Rows<const T> x, GradMode mode, Compute<T>* y) {
  down_columns<1, kCount, T>(
      x.rows, x.columns,
      [&](std::int64_t t, std::int64_t c, Compute<T>(&sums)[1][kCount]) {
        const auto in = load<kCount>(x.row(t) + c);
        for (int k = 0; k < kCount; ++k) sums[0][k] += in.element[k];
      },
      [&](int, std::int64_t c, Compute<T> sum) { write(mode, sum, y + c); });
}

/// One block: what is added up this way is short, one number a row at most.
template <class T>
__global__ void __launch_bounds__(kThreads) add_up(const T* x, std::int64_t count, GradMode mode, T* sum) {
  T mine = 0;
  for (std::int64_t i = threadIdx.x; i < count; i += kThreads) mine += x[i];
  mine = over_block<Sum, kThreads>(mine);
  if (threadIdx.x == 0) *sum = mode == GradMode::accumulate ? *sum + mine : mine;
}

}  // namespace

template <class T>
void fill(const Stream& stream, Rows<T> y, T value) {
  constexpr std::int64_t kMostRows = 65535;  // of a grid
  if (y.elements() == 0) return;
  if (y.contiguous()) y = {y.data, y.elements(), 1, y.elements()};
  launch(stream, dim3(blocks_for(y.columns, kThreads, 1 << 14), blocks_for(y.rows, 1, kMostRows)), kThreads, 0,
         fill_kernel<T>, y, value);
}
template <class T>
void add_to(const Stream& stream, Rows<const T> x, GradMode mode, Rows<T> y) {
  if (mode == GradMode::overwrite) map(stream, Same(), y, x);
  else map(stream, Sum(), y, as_const(y), x);
}
template <class T>
void add(const Stream& stream, Rows<const T> a, Rows<const T> b, Rows<T> y) {
  map(stream, Sum(), y, a, b);
}
template <class T>
void add_in_order(const Stream& stream, const Parts<T>& parts, T* y, std::int64_t count) {
  fold_in_order(stream, parts, Sum(), y, count);
}
template <class T>
void max_in_order(const Stream& stream, const Parts<T>& parts, T* y, std::int64_t count) {
  fold_in_order(stream, parts, LargestOrNaN(), y, count);
}
template <class T>
void scale(const Stream& stream, Compute<T> alpha, Rows<const T> x, Rows<T> y) {
  map(stream, Times<Compute<T>>{alpha}, y, x);
}
template <class T>
void add_row(const Stream& stream, const Compute<T>* row, Rows<T> y) {
  constexpr std::int64_t kMostRows = 65535;  // of a grid
  if (y.elements() == 0) return;
  launch(stream, dim3(blocks_for(y.columns, kThreads), blocks_for(y.rows, 1, kMostRows)), kThreads, 0,
         add_row_kernel<T>, row, y);
}
template <class T>
void column_sums(const Stream& stream, Rows<const T> x, GradMode mode, Compute<T>* y) {
  constexpr int kCount = kWhole<T>;
  if (x.columns == 0) return;
  launch(stream, strips_of<T>(x.columns), kStripThreads, 0,
         packs<kCount>(x) ? column_sums_kernel<kCount, T> : column_sums_kernel<1, T>, x, mode, y);
}
template <class T>
void sum_to(const Stream& stream, const T* x, std::int64_t count, GradMode mode, T* sum) {
  launch(stream, 1, kThreads, 0, add_up<T>, x, count, mode, sum);
}
void to_bf16(const Stream& stream, Rows<const float> x, Rows<bf16> y) { map(stream, Same(), y, x); }
void from_bf16(const Stream& stream, Rows<const bf16> x, Rows<float> y) { map(stream, Same(), y, x); }

#define TFORGE_INSTANTIATE(T)                                                 \
  template void add_to<T>(const Stream&, Rows<const T>, GradMode, Rows<T>);   \
  template void add<T>(const Stream&, Rows<const T>, Rows<const T>, Rows<T>); \
  template void scale<T>(const Stream&, Compute<T>, Rows<const T>, Rows<T>);  \
  template void add_row<T>(const Stream&, const Compute<T>*, Rows<T>);        \
  template void fill<T>(const Stream&, Rows<T>, T);                           \
  template void column_sums<T>(const Stream&, Rows<const T>, GradMode, Compute<T>*)
TFORGE_INSTANTIATE(float);
TFORGE_INSTANTIATE(double);
TFORGE_INSTANTIATE(bf16);
#undef TFORGE_INSTANTIATE

#define TFORGE_INSTANTIATE(T)                                                      \
  template void add_in_order<T>(const Stream&, const Parts<T>&, T*, std::int64_t); \
  template void max_in_order<T>(const Stream&, const Parts<T>&, T*, std::int64_t); \
  template void sum_to<T>(const Stream&, const T*, std::int64_t, GradMode, T*)
TFORGE_INSTANTIATE(float);
TFORGE_INSTANTIATE(double);
#undef TFORGE_INSTANTIATE

}  // namespace tforge::kernels::cuda
