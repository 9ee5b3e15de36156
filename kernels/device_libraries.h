#pragma once
// What the kernels of a CUDA device keep between calls: the handle of cuBLASLt, its workspace, and for each product
// that was asked for the algorithm that was chosen.
#include <memory>

#include "core/allocator.h"
#include "core/device.h"
#include "core/tensor.h"

namespace tforge::kernels {

namespace cuda {
class MatrixProducts;
}

/// Belongs to one stream, whose products (kernels/gemm.h, Pattention, the head) need it on a CUDA device; on the CPU it
/// is empty. Made in main behind stream and allocator, which outlive it.
class DeviceLibraries {
 public:
  /// Throws DeviceError when cuBLASLt does not start, ResourceError.
  DeviceLibraries(Stream& stream, Allocator& allocator, F32Products f32 = F32Products::exact);
  ~DeviceLibraries();
  DeviceLibraries(const DeviceLibraries&) = delete;
  DeviceLibraries& operator=(const DeviceLibraries&) = delete;

  cuda::MatrixProducts& products() { return *products_; }

 private:
  Stream& stream_;
  Tensor workspace_;
  std::unique_ptr<cuda::MatrixProducts> products_;
};

}  // namespace tforge::kernels
