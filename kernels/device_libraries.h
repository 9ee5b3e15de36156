#pragma once
// What the kernels of a CUDA device keep between calls: the handle of cuBLASLt, its workspace, and for each product
// that was asked for the algorithm that was chosen.
#include <map>
#include <memory>
#include <string>

#include "core/allocator.h"
#include "core/device.h"
#include "core/tensor.h"
#include "kernels/choices.h"

namespace tforge::kernels {

namespace cuda {
class MatrixProducts;
}

/// Belongs to one stream, whose products (kernels/gemm.h, Pattention, the head) need it on a CUDA device; on the CPU it
/// is empty. Made in main behind stream and allocator, which outlive it.
class DeviceLibraries {
 public:
  /// Throws DeviceError when cuBLASLt does not start, ResourceError.
  DeviceLibraries(Stream& stream, Allocator& allocator, F32Products f32 = F32Products::exact,
                  Choosing how = Choosing::rule);
  ~DeviceLibraries();
  DeviceLibraries(const DeviceLibraries&) = delete;
  DeviceLibraries& operator=(const DeviceLibraries&) = delete;

  cuda::MatrixProducts& products() { return *products_; }
  Choices& choices() { return choices_; }
  /// From now on products use the algorithms of `known`, which stand in the file `source`, and the library's rule for
  /// others.
  void settle(std::map<std::string, std::string> known, const std::string& source);
  /// What the bits of results depend on beside the program and `choices`: device and library. Empty on the CPU.
  std::string bits_depend_on() const;

 private:
  Stream& stream_;
  Tensor workspace_;
  Choices choices_;
  std::unique_ptr<cuda::MatrixProducts> products_;
};

}  // namespace tforge::kernels
