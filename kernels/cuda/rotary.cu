#include "kernels/cuda/rotary.h"

#include "kernels/cuda/launch.cuh"

namespace tforge::kernels::cuda {

namespace {

constexpr int kThreads = 128;

template <class T>
__global__ void __launch_bounds__(kThreads) fill_tables(double base, Rows<T> cosine, Rows<T> sine) {
  const std::int64_t position = blockIdx.x;
  for (std::int64_t i = threadIdx.x; i < cosine.columns; i += kThreads) {
    const double angle =
        static_cast<double>(position) * pow(base, -static_cast<double>(i) / static_cast<double>(cosine.columns));
    cosine.row(position)[i] = static_cast<T>(cos(angle));
    sine.row(position)[i] = static_cast<T>(sin(angle));
  }
}

/// One block a row of x, one thread some of its pairs, kCount neighbours at a time.
template <int kCount, class T>
__global__ void __launch_bounds__(kThreads)
    rotate(Compute<T> sign, Rows<const Compute<T>> cosine, Rows<const Compute<T>> sine, int heads, std::int64_t seq,
           std::int64_t first_position, Rows<T> x) {
  const int half = static_cast<int>(cosine.columns), head_dim = static_cast<int>(x.columns) / heads;
  const std::int64_t position = first_position + blockIdx.x % seq;
  for (int pair = static_cast<int>(threadIdx.x) * kCount; pair < heads * half; pair += kThreads * kCount) {
    const int i = pair % half;
    T* const lower = x.row(blockIdx.x) + pair / half * head_dim + i;
    T* const upper = lower + half;
    auto x1 = load<kCount>(lower), x2 = load<kCount>(upper);
    const auto c = load<kCount>(cosine.row(position) + i), s = load<kCount>(sine.row(position) + i);
    for (int k = 0; k < kCount; ++k) {
      const Compute<T> a = x1.element[k], b = x2.element[k], sine_of_k = sign * s.element[k];
      // Left to the compiler, which product is rounded would depend on kCount.
      x1.element[k] = fma(a, c.element[k], -(b * sine_of_k));
      x2.element[k] = fma(a, sine_of_k, b * c.element[k]);
    }
    store<kCount>(lower, x1);
    store<kCount>(upper, x2);
  }
}

}  // namespace

template <class T>
void rotary_tables(const Stream& stream, double base, Rows<T> cosine, Rows<T> sine) {
  if (cosine.elements() == 0) return;
  launch(stream, static_cast<unsigned>(cosine.rows), kThreads, 0, fill_tables<T>, base, cosine, sine);
}

template <class T>
void rotary_apply(const Stream& stream, Compute<T> sign, Rows<const Compute<T>> cosine, Rows<const Compute<T>> sine,
                  std::int64_t heads, std::int64_t seq, std::int64_t first_position, Rows<T> x) {
  constexpr int kCount = kWhole<Compute<T>>;
  if (x.rows == 0 || cosine.columns == 0) return;
  const bool whole =
      packs<kCount>(cosine) && packs<kCount>(sine) && packs<kCount>(x) && x.columns / heads % kCount == 0;
  launch(stream, static_cast<unsigned>(x.rows), kThreads, 0, whole ? rotate<kCount, T> : rotate<1, T>, sign, cosine,
         sine, static_cast<int>(heads), seq, first_position, x);
}

template void rotary_tables<float>(const Stream&, double, Rows<float>, Rows<float>);
template void rotary_tables<double>(const Stream&, double, Rows<double>, Rows<double>);
#define TFORGE_INSTANTIATE(T)                                                                              \
  template void rotary_apply<T>(const Stream&, Compute<T>, Rows<const Compute<T>>, Rows<const Compute<T>>, \
                                std::int64_t, std::int64_t, std::int64_t, Rows<T>)
TFORGE_INSTANTIATE(float);
TFORGE_INSTANTIATE(double);
TFORGE_INSTANTIATE(bf16);
#undef TFORGE_INSTANTIATE

}  // namespace tforge::kernels::cuda
