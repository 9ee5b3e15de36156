// A block has a head of one sequence; of the gradient of the projection a warp has an element, and adds the sequences
// in order.
#include "kernels/cuda/slots.h"

#include "kernels/cuda/launch.cuh"

namespace tforge::kernels::cuda {

namespace {

constexpr int kThreads = 256;

template <class T>
__global__ void __launch_bounds__(kThreads)
    forward(SlotHeads shape, Rows<const T> projection, Rows<const T> x, Rows<T> y) {
  const std::int64_t b = blockIdx.x / shape.heads, h = blockIdx.x % shape.heads, column = h * shape.head_dim;
  for (std::int64_t e = threadIdx.x; e < shape.slots * shape.head_dim; e += kThreads) {
    const std::int64_t s = e / shape.head_dim, c = column + e % shape.head_dim;
    const T* const weights = projection.row(h * shape.slots + s);
    Compute<T> sum = 0;
    for (std::int64_t j = 0; j < shape.block; ++j) {
      sum += computed(weights[j]) * computed(x.row(b * shape.x_stride + j)[c]);
    }
    y.row(b * shape.y_stride + s)[c] = stored<T>(sum);
  }
}

template <class T>
__global__ void __launch_bounds__(kThreads)
    backward(SlotHeads shape, Rows<const T> projection, Rows<const T> dy, Rows<T> dx) {
  const std::int64_t b = blockIdx.x / shape.heads, h = blockIdx.x % shape.heads, column = h * shape.head_dim;
  for (std::int64_t e = threadIdx.x; e < shape.block * shape.head_dim; e += kThreads) {
    const std::int64_t j = e / shape.head_dim, c = column + e % shape.head_dim;
    T& to = dx.row(b * shape.x_stride + j)[c];
    Compute<T> sum = computed(to);
    for (std::int64_t s = 0; s < shape.slots; ++s) {
      sum += computed(projection.row(h * shape.slots + s)[j]) * computed(dy.row(b * shape.y_stride + s)[c]);
    }
    to = stored<T>(sum);
  }
}

template <class T>
__global__ void __launch_bounds__(kThreads)
    projection_gradient(SlotHeads shape, Rows<const T> x, Rows<const T> dy, GradMode mode, Rows<Compute<T>> gradient) {
  const std::int64_t element = static_cast<std::int64_t>(blockIdx.x) * (kThreads / kWarp) + threadIdx.x / kWarp;
  if (element >= gradient.elements()) return;
  const std::int64_t row = element / shape.block, j = element % shape.block;
  const std::int64_t column = row / shape.slots * shape.head_dim, s = row % shape.slots;
  Compute<T>& to = gradient.row(row)[j];
  Compute<T> all = mode == GradMode::overwrite ? Compute<T>(0) : to;
  for (std::int64_t b = 0; b < shape.batch; ++b) {
    Compute<T> sum = 0;
    for (std::int64_t c = threadIdx.x % kWarp; c < shape.head_dim; c += kWarp) {
      sum += computed(dy.row(b * shape.y_stride + s)[column + c]) * computed(x.row(b * shape.x_stride + j)[column + c]);
    }
    all += over_warp<Sum>(sum);
  }
  if (threadIdx.x % kWarp == 0) to = all;
}

}  // namespace

template <class T>
void slots_forward(const Stream& stream, const SlotHeads& shape, Rows<const T> projection, Rows<const T> x, Rows<T> y) {
  if (shape.batch == 0) return;
  launch(stream, dim3(static_cast<unsigned>(shape.batch * shape.heads)), kThreads, 0, forward<T>, shape, projection, x,
         y);
}

template <class T>
void slots_backward(const Stream& stream, const SlotHeads& shape, Rows<const T> projection, Rows<const T> x,
                    Rows<const T> dy, Rows<T> dx, GradMode mode, Rows<Compute<T>> dprojection) {
  if (shape.batch > 0) {
    launch(stream, dim3(static_cast<unsigned>(shape.batch * shape.heads)), kThreads, 0, backward<T>, shape, projection,
           dy, dx);
  }
  if (dprojection) {
    launch(stream, blocks_for(dprojection.elements(), kThreads / kWarp, std::int64_t{1} << 31), kThreads, 0,
           projection_gradient<T>, shape, x, dy, mode, dprojection);
  }
}

#define TFORGE_INSTANTIATE(T)                                                                                   \
  template void slots_forward<T>(const Stream&, const SlotHeads&, Rows<const T>, Rows<const T>, Rows<T>);       \
  template void slots_backward<T>(const Stream&, const SlotHeads&, Rows<const T>, Rows<const T>, Rows<const T>, \
                                  Rows<T>, GradMode, Rows<Compute<T>>)
TFORGE_INSTANTIATE(float);
TFORGE_INSTANTIATE(double);
TFORGE_INSTANTIATE(bf16);
#undef TFORGE_INSTANTIATE

}  // namespace tforge::kernels::cuda
