// Devices: who has none says so; memory on one, copies there and back.
#include <gtest/gtest.h>

#include <cmath>
#include <numeric>
#include <vector>

#include "core/copy.h"
#include "core/tensor.h"
#include "support/cuda_device.h"

namespace tforge {
namespace {

std::vector<float> numbers(std::size_t count) {
  std::vector<float> values(count);
  std::iota(values.begin(), values.end(), 1.0F);
  return values;
}

TEST(Devices, TheCpuIsAlwaysThere) {
  EXPECT_EQ(devices_of(Device::cpu).count, 1);
  DeviceQueue queue(Device::cpu);
  EXPECT_EQ(queue.stream().device(), Device::cpu);
  wait(queue.stream());
}

TEST(Devices, WithoutOneTheErrorSaysWhy) {
  const Devices found = devices_of(Device::cuda);
  if (found.count > 0) GTEST_SKIP() << "there is a device";
  EXPECT_FALSE(found.why_none.empty());
  try {
    DeviceQueue queue(Device::cuda);
    FAIL() << "a queue on no device";
  } catch (const DeviceError& error) {
    EXPECT_EQ(error.code(), ExitCode::no_resources);
    EXPECT_NE(std::string(error.what()).find(found.why_none), std::string::npos) << error.what();
  }
}

TEST(Devices, CudaKnowsItsNumber) {
  test::on_cuda([](test::CudaDevice& device) {
    EXPECT_EQ(device.stream.device(), Device::cuda);
    EXPECT_NE(device.stream.native(), nullptr);
    EXPECT_THROW(DeviceQueue(Device::cuda, 1000), DeviceError);
  });
}

TEST(Copies, ToCudaHaveReadOrdinaryMemoryOnReturn) {
  test::on_cuda([](test::CudaDevice& device) {
    std::vector<float> values = numbers(30);
    const Tensor there = Tensor::of<float>(device.memory, Shape{5, 6}, values, Purpose::weights);
    std::ranges::fill(values, -1.0F);
    Allocator host;
    EXPECT_TRUE(std::ranges::equal(there.clone(host).span<float>(), numbers(30)));
  });
}

TEST(Tensors, GoToCudaAndBack) {
  test::on_cuda([](test::CudaDevice& device) {
    Allocator host;
    const std::vector<float> values = numbers(30);
    const Tensor there = Tensor::of<float>(device.memory, Shape{5, 6}, values, Purpose::weights);
    EXPECT_EQ(there.device(), Device::cuda);
    EXPECT_EQ(there.view().device, Device::cuda);
    EXPECT_THROW(static_cast<void>(there.span<float>()), InternalError);
    const Tensor twin = there.clone(device.memory);
    const Tensor back = twin.clone(host);
    EXPECT_EQ(back.device(), Device::cpu);
    EXPECT_TRUE(std::ranges::equal(back.span<float>(), values));
    const Tensor zeros = Tensor::zeros(device.memory, Shape{3}, DType::f64, Purpose::moments).clone(host);
    for (const double zero : zeros.span<double>()) EXPECT_EQ(zero, 0);
  });
}

TEST(Tensors, CudaCopiesRowsApart) {
  test::on_cuda([](test::CudaDevice& device) {
    Allocator host;
    const Tensor from = Tensor::of<float>(host, Shape{4, 6}, numbers(24), Purpose::weights);
    Tensor there = Tensor::zeros(device.memory, Shape{4, 8}, DType::f32, Purpose::weights);
    copy(device.stream, from.view().column_range(1, 3), there.view().column_range(2, 3));
    const Tensor back = there.clone(host);
    const auto values = back.span<float>();
    for (std::size_t r = 0; r < 4; ++r) {
      for (std::size_t c = 0; c < 8; ++c) {
        const float want = c >= 2 && c < 5 ? static_cast<float>(6 * r + (c - 2) + 2) : 0.0F;
        EXPECT_EQ(values[8 * r + c], want);
      }
    }
    EXPECT_THROW(copy(device.stream, from.view(), there.view()), ShapeError);
    Stream cpu;
    EXPECT_THROW(copy(cpu, from.view().column_range(0, 3), there.view().column_range(0, 3)), InternalError);
  });
}

TEST(Allocator, CudaRecyclesAndReports) {
  test::on_cuda([](test::CudaDevice& device) {
    Allocator pinned(device.stream, HostMemory::pinned);
    for (Allocator* memory : {&device.memory, &pinned}) {
      const void* first = nullptr;
      {
        const Tensor t = Tensor::empty(*memory, Shape{1000}, DType::f32, Purpose::activations);
        first = t.view().data;
      }
      const Tensor again = Tensor::empty(*memory, Shape{1000}, DType::f32, Purpose::gradients);
      EXPECT_EQ(again.view().data, first);
      EXPECT_EQ(memory->report().system_requests, 1U);
      EXPECT_EQ(memory->report().total_peak, 4000U);
    }
    EXPECT_EQ(device.memory.device(), Device::cuda);
    EXPECT_EQ(pinned.device(), Device::cpu);
  });
}

}  // namespace
}  // namespace tforge
