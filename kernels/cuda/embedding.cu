#include "kernels/cuda/embedding.h"

#include "kernels/cuda/sort.cuh"

namespace tforge::kernels::cuda {

namespace {

constexpr int kRowThreads = 128;

template <int kCount, class T>
__global__ void __launch_bounds__(kRowThreads)
    look_up(const std::int32_t* tokens, Rows<const T> table, std::int64_t first_row, Rows<T> y) {
  const std::int64_t t = blockIdx.x;
  const std::int64_t row = tokens[t] - first_row;
  const bool held = row >= 0 && row < table.rows;
  for (std::int64_t c = threadIdx.x * kCount; c < y.columns; c += kRowThreads * kCount) {
    Pack<Compute<T>, kCount> pack{};
    if (held) pack = load<kCount>(table.row(row) + c);
    store<kCount>(y.row(t) + c, pack);
  }
}

__global__ void __launch_bounds__(kSortThreads)
    sort_tokens(const std::int32_t* tokens, std::int64_t count, std::int64_t first_row, std::int64_t rows,
                std::int32_t* end, std::int32_t* order) {
  sort_positions([&](std::int64_t t) { return tokens[t] - first_row; }, count, rows, end, order);
}

/// One block a table row, one thread a few columns: added in order of the positions.
template <int kCount, class T>
__global__ void __launch_bounds__(kRowThreads)
    add_rows(Rows<const T> dy, const std::int32_t* end, const std::int32_t* order, GradMode mode,
             Rows<Compute<T>> dtable) {
  const std::int64_t row = blockIdx.x;
  const std::int32_t first = row == 0 ? 0 : end[row - 1], last = end[row];
  if (first == last && mode == GradMode::accumulate) return;
  for (std::int64_t c = threadIdx.x * kCount; c < dtable.columns; c += kRowThreads * kCount) {
    Pack<Compute<T>, kCount> sum{};
    std::int32_t next = first;
    if (mode == GradMode::accumulate) sum = load<kCount>(dtable.row(row) + c);
    else if (first < last) sum = load<kCount>(dy.row(order[next++]) + c);
    for (; next < last; ++next) {
      const Pack<Compute<T>, kCount> more = load<kCount>(dy.row(order[next]) + c);
      for (int k = 0; k < kCount; ++k) sum.element[k] += more.element[k];
    }
    store<kCount>(dtable.row(row) + c, sum);
  }
}

}  // namespace

template <class T>
void embedding_forward(const Stream& stream, const std::int32_t* tokens, Rows<const T> table, std::int64_t first_row,
                       Rows<T> y) {
  constexpr int kCount = kWhole<T>;
  if (y.elements() == 0) return;
  const bool whole = packs<kCount>(y) && packs<kCount>(table);
  launch(stream, static_cast<unsigned>(y.rows), kRowThreads, 0, whole ? look_up<kCount, T> : look_up<1, T>, tokens,
         table, first_row, y);
}

template <class T>
void embedding_backward(const Stream& stream, const std::int32_t* tokens, Rows<const T> dy, std::int64_t first_row,
                        GradMode mode, Rows<Compute<T>> dtable, std::int32_t* workspace) {
  constexpr int kCount = kWhole<Compute<T>>;
  if (dtable.elements() == 0) return;
  std::int32_t* const order = workspace + dtable.rows;
  launch(stream, 1, kSortThreads, 0, sort_tokens, tokens, dy.rows, first_row, dtable.rows, workspace, order);
  const bool whole = packs<kCount>(dy) && packs<kCount>(dtable);
  launch(stream, static_cast<unsigned>(dtable.rows), kRowThreads, 0, whole ? add_rows<kCount, T> : add_rows<1, T>, dy,
         workspace, order, mode, dtable);
}

#define TFORGE_INSTANTIATE(T)                                                                                    \
  template void embedding_forward<T>(const Stream&, const std::int32_t*, Rows<const T>, std::int64_t, Rows<T>);  \
  template void embedding_backward<T>(const Stream&, const std::int32_t*, Rows<const T>, std::int64_t, GradMode, \
                                      Rows<Compute<T>>, std::int32_t*)
TFORGE_INSTANTIATE(float);
TFORGE_INSTANTIATE(double);
TFORGE_INSTANTIATE(bf16);
#undef TFORGE_INSTANTIATE

}  // namespace tforge::kernels::cuda
