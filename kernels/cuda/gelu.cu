#include "kernels/cuda/gelu.h"

#include "kernels/cuda/gelu.cuh"
#include "kernels/cuda/map.cuh"

namespace tforge::kernels::cuda {

namespace {

struct Gelu {
  template <class T>
  __device__ T operator()(T x) const {
    return gelu(x);
  }
};
struct ThroughGelu {
  template <class T>
  __device__ T operator()(T x, T dy) const {
    return dy * gelu_slope(x);
  }
  template <class T>
  __device__ T operator()(T x, T dy, T before) const {
    return before + dy * gelu_slope(x);
  }
};

}  // namespace

template <class T>
void gelu_forward(const Stream& stream, Rows<const T> x, Rows<T> y) {
  map(stream, Gelu(), y, x);
}

template <class T>
void gelu_backward(const Stream& stream, Rows<const T> x, Rows<const T> dy, GradMode mode, Rows<T> dx) {
  if (mode == GradMode::overwrite) map(stream, ThroughGelu(), dx, x, dy);
  else map(stream, ThroughGelu(), dx, x, dy, as_const(dx));
}

#define TFORGE_INSTANTIATE(T)                                           \
  template void gelu_forward<T>(const Stream&, Rows<const T>, Rows<T>); \
  template void gelu_backward<T>(const Stream&, Rows<const T>, Rows<const T>, GradMode, Rows<T>)
TFORGE_INSTANTIATE(float);
TFORGE_INSTANTIATE(double);
TFORGE_INSTANTIATE(bf16);
#undef TFORGE_INSTANTIATE

}  // namespace tforge::kernels::cuda
