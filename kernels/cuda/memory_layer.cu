#include "kernels/cuda/memory_layer.h"

#include <limits>

#include "kernels/cuda/sort.cuh"

namespace tforge::kernels::cuda {

namespace {

constexpr int kThreads = 128;

/// One block a row of x, one thread a table.
template <class T>
__global__ void __launch_bounds__(kThreads)
    hash_row(HashNumbers<T> hash, Rows<const T> x, Rows<std::int32_t> codes, Rows<T> weights) {
  const std::int64_t t = blockIdx.x;
  for (std::int64_t k = threadIdx.x; k < hash.coordinates.columns; k += kThreads) {
    std::int32_t code = 0;
    T product = 1, size = 0;
    for (std::int64_t i = 0; i < hash.coordinates.rows; ++i) {
      const T z = x.row(t)[hash.coordinates.row(i)[k]];
      code = 2 * code + (z < T(0) ? 0 : 1);
      if (i >= hash.weight_bits) continue;
      product *= T(1) + exp(hash.minus_two_over_t * fabs(z));
      size += fabs(z);
    }
    codes.row(t)[k] = code;
    weights.row(t)[k] = (hash.weight == HashWeight::l1_times_p ? size : T(1)) / product;
  }
}

/// One block a row of y, one thread a few columns, table by table.
template <int kCount, class T>
__global__ void __launch_bounds__(kThreads)
    look_up(std::int64_t bits, Rows<const std::int32_t> codes, Rows<const T> weights, Rows<const T> tables, Rows<T> y) {
  const std::int64_t t = blockIdx.x;
  for (std::int64_t c = threadIdx.x * kCount; c < y.columns; c += kThreads * kCount) {
    Pack<T, kCount> sum{};
    for (std::int64_t k = 0; k < codes.columns; ++k) {
      const auto row = load<kCount>(tables.row((k << bits) + codes.row(t)[k]) + c);
      const T weight = weights.row(t)[k];
      for (int j = 0; j < kCount; ++j) sum.element[j] += weight * row.element[j];
    }
    store<kCount>(y.row(t) + c, sum);
  }
}

/// One block a table.
__global__ void __launch_bounds__(kSortThreads)
    sort_codes(std::int64_t bits, Rows<const std::int32_t> codes, std::int32_t* order) {
  const std::int64_t k = blockIdx.x, keys = std::int64_t{1} << bits;
  std::int32_t* const end = order + k * (codes.rows + keys);
  sort_positions([&](std::int64_t t) -> std::int64_t { return codes.row(t)[k]; }, codes.rows, keys, end, end + keys);
}

/// One block a row of a table, one thread a few columns: its hits in the order of the text.
template <int kCount, class T>
__global__ void __launch_bounds__(kThreads)
    add_hits(std::int64_t bits, const std::int32_t* order, Rows<const T> weights, Rows<const T> dy, GradMode mode,
             Rows<T> dtables) {
  const std::int64_t row = blockIdx.x, k = row >> bits, keys = std::int64_t{1} << bits, code = row - (k << bits);
  const std::int32_t* const end = order + k * (dy.rows + keys);
  const std::int32_t* const hit = end + keys;
  const std::int32_t first = code == 0 ? 0 : end[code - 1], last = end[code];
  if (first == last && mode == GradMode::accumulate) return;
  for (std::int64_t c = threadIdx.x * kCount; c < dtables.columns; c += kThreads * kCount) {
    Pack<T, kCount> sum{};
    if (mode == GradMode::accumulate) sum = load<kCount>(dtables.row(row) + c);
    for (std::int32_t h = first; h < last; ++h) {
      const auto g = load<kCount>(dy.row(hit[h]) + c);
      const T weight = weights.row(hit[h])[k];
      for (int j = 0; j < kCount; ++j) sum.element[j] += weight * g.element[j];
    }
    if (c == 0 && first < last && sum.element[0] == T(0)) sum.element[0] = std::numeric_limits<T>::min();
    store<kCount>(dtables.row(row) + c, sum);
  }
}

/// One block a row of dy, one warp a table.
template <int kCount, class T>
__global__ void __launch_bounds__(kThreads)
    dot_rows(std::int64_t bits, Rows<const std::int32_t> codes, Rows<const T> tables, Rows<const T> dy, GradMode mode,
             Rows<T> dweights) {
  const std::int64_t t = blockIdx.x;
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  for (std::int64_t k = threadIdx.x / kWarp; k < codes.columns; k += kThreads / kWarp) {
    const T* const row = tables.row((k << bits) + codes.row(t)[k]);
    T sum = 0;
    for (std::int64_t first = lane * kWhole<T>; first < dy.columns; first += kWarp * kWhole<T>) {
      for (int i = 0; i < kWhole<T>; i += kCount) {  // a lane has the same columns whatever kCount
        if (first + i >= dy.columns) break;
        const auto a = load<kCount>(row + first + i);
        const auto b = load<kCount>(dy.row(t) + first + i);
        for (int j = 0; j < kCount; ++j) sum += a.element[j] * b.element[j];
      }
    }
    sum = over_warp<Sum>(sum);
    T* const to = dweights.row(k) + t;
    if (lane == 0) *to = mode == GradMode::accumulate ? *to + sum : sum;
  }
}

/// One warp a row of x. Each lane has the slopes of one table; they are added lane by lane, since tables may share
/// coordinates.
template <class T>
__global__ void __launch_bounds__(kWarp)
    through_hash(HashNumbers<T> hash, Rows<const T> x, Rows<const T> dweights, GradMode mode, Rows<T> dx) {
  T* const sum = dynamic_shared<T>();
  const std::int64_t t = blockIdx.x, tables = hash.coordinates.columns;
  const int lane = static_cast<int>(threadIdx.x);
  for (std::int64_t c = lane; c < x.columns; c += kWarp) sum[c] = mode == GradMode::accumulate ? dx.row(t)[c] : T(0);
  __syncwarp();
  for (std::int64_t first = 0; first < tables; first += kWarp) {
    const std::int64_t k = first + lane;
    std::int32_t at[kMostHashBits] = {};
    T slope[kMostHashBits] = {};
    if (k < tables) {
      T product = 1, size = 0;
      for (int i = 0; i < kMostHashBits; ++i) {
        if (i >= hash.weight_bits) continue;
        at[i] = hash.coordinates.row(i)[k];
        const T z = x.row(t)[at[i]], e = exp(hash.minus_two_over_t * fabs(z));
        product *= T(1) + e;
        size += fabs(z);
        const T of_log = -hash.minus_two_over_t * e / (T(1) + e);  // d ln p / d|z_i|
        slope[i] = z < T(0) ? -of_log : of_log;
      }
      const T upward = dweights.row(k)[t] / product;
      for (int i = 0; i < kMostHashBits; ++i) {
        if (i >= hash.weight_bits) continue;
        if (hash.weight == HashWeight::l1_times_p) {
          slope[i] = size * slope[i] + (x.row(t)[at[i]] < T(0) ? T(-1) : T(1));
        }
        slope[i] *= upward;
      }
    }
    for (int turn = 0; turn < kWarp; ++turn) {
      if (turn == lane && k < tables) {
        for (int i = 0; i < kMostHashBits; ++i) {
          if (i < hash.weight_bits) sum[at[i]] += slope[i];
        }
      }
      __syncwarp();
    }
  }
  for (std::int64_t c = lane; c < x.columns; c += kWarp) dx.row(t)[c] = sum[c];
}

unsigned grid_of(std::int64_t rows) { return static_cast<unsigned>(rows); }

}  // namespace

template <class T>
void memory_hash_forward(const Stream& stream, const HashNumbers<T>& hash, Rows<const T> x, Rows<std::int32_t> codes,
                         Rows<T> weights) {
  if (codes.elements() == 0) return;
  launch(stream, grid_of(x.rows), kThreads, 0, hash_row<T>, hash, x, codes, weights);
}

template <class T>
void memory_lookup_forward(const Stream& stream, std::int64_t bits, Rows<const std::int32_t> codes,
                           Rows<const T> weights, Rows<const T> tables, Rows<T> y) {
  constexpr int kCount = kWhole<T>;
  if (y.elements() == 0) return;
  const bool whole = packs<kCount>(tables) && packs<kCount>(y);
  launch(stream, grid_of(y.rows), kThreads, 0, whole ? look_up<kCount, T> : look_up<1, T>, bits, codes, weights, tables,
         y);
}

void memory_sort(const Stream& stream, std::int64_t bits, Rows<const std::int32_t> codes, std::int32_t* order) {
  if (codes.columns == 0) return;
  launch(stream, grid_of(codes.columns), kSortThreads, 0, sort_codes, bits, codes, order);
}

template <class T>
void memory_table_gradients(const Stream& stream, std::int64_t bits, const std::int32_t* order, Rows<const T> weights,
                            Rows<const T> dy, GradMode mode, Rows<T> dtables) {
  constexpr int kCount = kWhole<T>;
  if (dtables.elements() == 0) return;
  const bool whole = packs<kCount>(dy) && packs<kCount>(dtables);
  launch(stream, grid_of(dtables.rows), kThreads, 0, whole ? add_hits<kCount, T> : add_hits<1, T>, bits, order, weights,
         dy, mode, dtables);
}

template <class T>
void memory_weight_gradients(const Stream& stream, std::int64_t bits, Rows<const std::int32_t> codes,
                             Rows<const T> tables, Rows<const T> dy, GradMode mode, Rows<T> dweights) {
  constexpr int kCount = kWhole<T>;
  if (dweights.elements() == 0) return;
  const bool whole = packs<kCount>(tables) && packs<kCount>(dy);
  launch(stream, grid_of(dy.rows), kThreads, 0, whole ? dot_rows<kCount, T> : dot_rows<1, T>, bits, codes, tables, dy,
         mode, dweights);
}

template <class T>
void memory_hash_backward(const Stream& stream, const HashNumbers<T>& hash, Rows<const T> x, Rows<const T> dweights,
                          GradMode mode, Rows<T> dx) {
  if (dx.elements() == 0) return;
  launch(stream, grid_of(x.rows), kWarp, static_cast<std::size_t>(x.columns) * sizeof(T), through_hash<T>, hash, x,
         dweights, mode, dx);
}

#define TFORGE_INSTANTIATE(T)                                                                                         \
  template void memory_hash_forward<T>(const Stream&, const HashNumbers<T>&, Rows<const T>, Rows<std::int32_t>,       \
                                       Rows<T>);                                                                      \
  template void memory_lookup_forward<T>(const Stream&, std::int64_t, Rows<const std::int32_t>, Rows<const T>,        \
                                         Rows<const T>, Rows<T>);                                                     \
  template void memory_table_gradients<T>(const Stream&, std::int64_t, const std::int32_t*, Rows<const T>,            \
                                          Rows<const T>, GradMode, Rows<T>);                                          \
  template void memory_weight_gradients<T>(const Stream&, std::int64_t, Rows<const std::int32_t>, Rows<const T>,      \
                                           Rows<const T>, GradMode, Rows<T>);                                         \
  template void memory_hash_backward<T>(const Stream&, const HashNumbers<T>&, Rows<const T>, Rows<const T>, GradMode, \
                                        Rows<T>)
TFORGE_INSTANTIATE(float);
TFORGE_INSTANTIATE(double);
#undef TFORGE_INSTANTIATE

}  // namespace tforge::kernels::cuda
