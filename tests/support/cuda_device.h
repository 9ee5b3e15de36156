#pragma once
// Tests on a CUDA device: the first one there is, or else a skipped test that says why.
#include <gtest/gtest.h>

#include "core/allocator.h"
#include "core/device_queue.h"

namespace tforge::test {

struct CudaDevice {
  DeviceQueue queue{Device::cuda};
  Stream& stream = queue.stream();
  Allocator memory{stream};
};

/// Runs f(device) in a test whose name says Cuda. Nothing may follow the call.
template <class F>
void on_cuda(const F& f) {
  const Devices found = devices_of(Device::cuda);
  if (found.count == 0) GTEST_SKIP() << "no CUDA device: " << found.why_none;
  CudaDevice device;
  f(device);
}

}  // namespace tforge::test
