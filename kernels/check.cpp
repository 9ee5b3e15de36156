#include "kernels/check.h"

#include "core/cuda_built.h"

namespace tforge::kernels {

void check_built(const char* op, const Stream& stream) {
  if (stream.device() != Device::cpu && !kCudaBuilt && !stream.rehearses())
    throw DeviceError("{}: this build has CPU kernels only", op);
}

}  // namespace tforge::kernels
