#include "kernels/device_libraries.h"

#include "core/cuda_built.h"
#include "core/errors.h"
#include "kernels/cuda/gemm.h"

namespace tforge::kernels {

DeviceLibraries::DeviceLibraries(Stream& stream, Allocator& allocator, [[maybe_unused]] F32Products f32, Choosing how)
    : stream_(stream), choices_(how) {
  if (stream.device() != Device::cuda) return;
  constexpr std::int64_t kWorkspace = std::int64_t{32} << 20;  // bytes; what cuBLAS itself takes on sm_90
  workspace_ = Tensor::empty(allocator, Shape{kWorkspace / 4}, DType::f32, Purpose::workspace);
  if (stream.rehearses()) return;
  if constexpr (kCudaBuilt) {
    products_ = cuda::make_products(workspace_.view().data, static_cast<std::size_t>(kWorkspace), f32, choices_);
    stream_.set_libraries(this);
  }
}

DeviceLibraries::~DeviceLibraries() {
  if (stream_.libraries() == this) stream_.set_libraries(nullptr);
}

void DeviceLibraries::settle(std::map<std::string, std::string> known, const std::string& source) {
  choices_.settle(std::move(known), source);
  if constexpr (kCudaBuilt) {
    if (products_) products_->forget();
  }
}

std::string DeviceLibraries::bits_depend_on() const {
  if constexpr (kCudaBuilt) {
    if (products_) return products_->bits_depend_on();
  }
  return {};
}

}  // namespace tforge::kernels
