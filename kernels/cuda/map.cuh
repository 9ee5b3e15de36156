#pragma once
// y = f(x...) element by element, for matrices of one shape.
#include "kernels/cuda/launch.cuh"
#include "kernels/cuda/rows.h"

namespace tforge::kernels::cuda {

inline constexpr int kMapThreads = 256;

template <int kCount, class Out, class F, class... In>
__global__ void __launch_bounds__(kMapThreads) map_kernel(F f, Rows<Out> y, Rows<const In>... x) {
  const std::int64_t step = static_cast<std::int64_t>(gridDim.x) * kMapThreads * kCount;
  const std::int64_t first = (static_cast<std::int64_t>(blockIdx.x) * kMapThreads + threadIdx.x) * kCount;
  for (std::int64_t r = blockIdx.y; r < y.rows; r += gridDim.y) {
    for (std::int64_t c = first; c < y.columns; c += step) {
      Pack<Compute<Out>, kCount> out;
      const auto apply = [&](const auto&... in) {
        for (int k = 0; k < kCount; ++k) out.element[k] = f(in.element[k]...);
      };
      apply(load<kCount>(x.row(r) + c)...);
      store<kCount>(y.row(r) + c, out);
    }
  }
}

template <int kCount, class Out, class F, class... In>
void map_packs(const Stream& stream, const F& f, const Rows<Out>& y, const Rows<const In>&... x) {
  constexpr std::int64_t kMostRows = 65535;  // of a grid
  const dim3 grid(blocks_for(y.columns, kMapThreads * kCount, 1 << 14), blocks_for(y.rows, 1, kMostRows));
  void (*const kernel)(F, Rows<Out>, Rows<const In>...) = map_kernel<kCount, Out, F, In...>;
  launch(stream, grid, dim3(kMapThreads), 0, kernel, f, y, x...);
}

/// Every y(r, c) = f(x(r, c)...), of one x at least (nvcc 13.0 gives up on none). y may be one of the x.
template <class Out, class F, class... In>
void map(const Stream& stream, const F& f, Rows<Out> y, Rows<const In>... x) {
  if (y.elements() == 0) return;
  if (y.contiguous() && (x.contiguous() && ...)) {
    const auto flatten = [](auto& m) {
      m.columns = m.stride = m.elements();
      m.rows = 1;
    };
    flatten(y);
    (flatten(x), ...);
  }
  constexpr std::size_t kLargest = [] {
    std::size_t most = sizeof(Out);
    ((most = most < sizeof(In) ? sizeof(In) : most), ...);
    return most;
  }();
  constexpr int kCount = static_cast<int>(16 / kLargest);
  if (packs<kCount>(y) && (packs<kCount>(x) && ...)) map_packs<kCount>(stream, f, y, x...);
  else map_packs<1>(stream, f, y, x...);
}

}  // namespace tforge::kernels::cuda
