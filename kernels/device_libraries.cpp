#include "kernels/device_libraries.h"

#include "core/cuda_built.h"
#include "core/errors.h"
#include "kernels/cuda/gemm.h"

namespace tforge::kernels {

DeviceLibraries::DeviceLibraries(Stream& stream, Allocator& allocator, [[maybe_unused]] F32Products f32)
    : stream_(stream) {
  if (stream.device() != Device::cuda) return;
  constexpr std::int64_t kWorkspace = std::int64_t{32} << 20;  // bytes; what cuBLAS itself takes on sm_90
  workspace_ = Tensor::empty(allocator, Shape{kWorkspace / 4}, DType::f32, Purpose::workspace);
  if (stream.rehearses()) return;
  if constexpr (kCudaBuilt) {
    products_ = cuda::make_products(workspace_.view().data, static_cast<std::size_t>(kWorkspace), f32);
    stream_.set_libraries(this);
  }
}

DeviceLibraries::~DeviceLibraries() {
  if (stream_.libraries() == this) stream_.set_libraries(nullptr);
}

}  // namespace tforge::kernels
