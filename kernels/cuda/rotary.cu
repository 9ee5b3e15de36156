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

/// One block a row of x, one thread some of its pairs.
template <class T>
__global__ void __launch_bounds__(kThreads)
    rotate(Compute<T> sign, Rows<const Compute<T>> cosine, Rows<const Compute<T>> sine, int heads, std::int64_t seq,
           std::int64_t first_position, Rows<T> x) {
  const int half = static_cast<int>(cosine.columns), head_dim = static_cast<int>(x.columns) / heads;
  const std::int64_t position = first_position + blockIdx.x % seq;
  for (int pair = static_cast<int>(threadIdx.x); pair < heads * half; pair += kThreads) {
    const int i = pair % half;
    T* const lower = x.row(blockIdx.x) + pair / half * head_dim + i;
    T* const upper = lower + half;
    const Compute<T> x1 = computed(*lower), x2 = computed(*upper);
    const Compute<T> c = cosine.row(position)[i], s = sign * sine.row(position)[i];
    *lower = stored<T>(x1 * c - x2 * s);
    *upper = stored<T>(x2 * c + x1 * s);
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
  if (x.rows == 0 || cosine.columns == 0) return;
  launch(stream, static_cast<unsigned>(x.rows), kThreads, 0, rotate<T>, sign, cosine, sine, static_cast<int>(heads),
         seq, first_position, x);
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
