// The allocator: reuse, purposes, peaks, alignment, and the end of memory.
#include "core/allocator.h"

#include <gtest/gtest.h>

#include <cstdint>
#include <numeric>

#include "core/tensor.h"
#include "support/scratch.h"

namespace tforge {
namespace {

Tensor bytes(Allocator& allocator, std::int64_t count, Purpose purpose = Purpose::activations) {
  return Tensor::empty(allocator, Shape{count / 4}, DType::f32, purpose);
}
std::size_t at(const std::array<std::size_t, kPurposes>& by_purpose, Purpose purpose) {
  return by_purpose[static_cast<std::size_t>(purpose)];
}
const void* address(const Tensor& t) { return t.view().data; }

TEST(Allocator, GivesABlockBackAndOutAgain) {
  Allocator allocator;
  const void* first = nullptr;
  {
    const Tensor t = bytes(allocator, 10000);
    first = address(t);
    const Tensor other = bytes(allocator, 10000);
    EXPECT_NE(address(other), first);
  }
  EXPECT_EQ(allocator.report().system_requests, 2U);
  const Tensor a = bytes(allocator, 10000), b = bytes(allocator, 10000, Purpose::workspace);
  EXPECT_TRUE(address(a) == first || address(b) == first);
  EXPECT_EQ(allocator.report().system_requests, 2U);
}

TEST(Allocator, ASlightlySmallerRequestTakesTheBlockAMuchSmallerOneDoesNot) {
  Allocator allocator;
  { const Tensor t = bytes(allocator, 40960); }
  { const Tensor t = bytes(allocator, 39000); }
  EXPECT_EQ(allocator.report().system_requests, 1U);
  const Tensor small = bytes(allocator, 1000);
  EXPECT_EQ(allocator.report().system_requests, 2U);
}

TEST(Allocator, CountsBytesByPurpose) {
  Allocator allocator;
  const Tensor weights = bytes(allocator, 4000, Purpose::weights);
  {
    const Tensor a = bytes(allocator, 800), b = bytes(allocator, 1200);
    EXPECT_EQ(at(allocator.report().in_use, Purpose::activations), 2000U);
  }
  const Tensor workspace = bytes(allocator, 400, Purpose::workspace);
  const MemoryReport& report = allocator.report();
  EXPECT_EQ(at(report.in_use, Purpose::weights), 4000U);
  EXPECT_EQ(at(report.in_use, Purpose::activations), 0U);
  EXPECT_EQ(at(report.peak, Purpose::activations), 2000U);
  EXPECT_EQ(at(report.peak, Purpose::workspace), 400U);
  EXPECT_EQ(at(report.in_use, Purpose::moments), 0U);
  EXPECT_EQ(report.total_peak, 6000U);  // of a moment, not the sum of the peaks
  EXPECT_GE(report.reserved, 6000U);
}

TEST(Allocator, SharingCountsOnce) {
  Allocator allocator;
  Tensor t = bytes(allocator, 4000, Purpose::weights);
  const Tensor copy = t, part = t.rows(0, 10);
  EXPECT_EQ(at(allocator.report().in_use, Purpose::weights), 4000U);
  t = Tensor();
  EXPECT_EQ(at(allocator.report().in_use, Purpose::weights), 4000U);  // the others hold it
}

TEST(Allocator, PeakStartsAnewFromWhatIsInUse) {
  Allocator allocator;
  const Tensor kept = bytes(allocator, 4000);
  { const Tensor t = bytes(allocator, 40000); }
  EXPECT_EQ(at(allocator.report().peak, Purpose::activations), 44000U);
  allocator.reset_peak();
  EXPECT_EQ(at(allocator.report().peak, Purpose::activations), 4000U);
  EXPECT_EQ(allocator.report().total_peak, 4000U);
  { const Tensor t = bytes(allocator, 400); }
  EXPECT_EQ(allocator.report().total_peak, 4400U);
}

TEST(Allocator, TheSameStepAsksTheSystemOnce) {
  Allocator allocator;
  std::uint64_t after_first = 0;
  for (int step = 0; step < 5; ++step) {
    std::vector<Tensor> alive;
    for (std::int64_t i = 1; i <= 40; ++i) {
      alive.push_back(bytes(allocator, i * 3000));
      if (i % 3 == 0) alive.erase(alive.begin());
    }
    if (step == 0) after_first = allocator.report().system_requests;
    else EXPECT_EQ(allocator.report().system_requests, after_first) << step;
  }
}

TEST(Allocator, BlocksAreAligned) {
  Allocator allocator;
  for (const std::int64_t size : {4, 100, 5000, 1 << 20}) {
    EXPECT_EQ(reinterpret_cast<std::uintptr_t>(address(bytes(allocator, size))) % 64, 0U) << size;
  }
  EXPECT_EQ(reinterpret_cast<std::uintptr_t>(address(bytes(allocator, 3 << 20))) % (2 << 20), 0U);
}

TEST(Allocator, AnEmptyTensorIsATensor) {
  Allocator allocator;
  const Tensor none = Tensor::zeros(allocator, Shape{0, 7}, DType::f32, Purpose::weights);
  EXPECT_TRUE(static_cast<bool>(none));
  EXPECT_EQ(none.bytes(), 0U);
  EXPECT_EQ(at(allocator.report().in_use, Purpose::weights), 0U);
}

TEST(Allocator, SaysWhatIsInUseWhenMemoryEnds) {
  Allocator allocator;
  const Tensor weights = bytes(allocator, 3 << 20, Purpose::weights);
  const std::string message = test::error_of<ResourceError>(
      [&] { Tensor::empty(allocator, Shape{std::int64_t{1} << 55}, DType::f64, Purpose::moments); });
  EXPECT_EQ(message,
            "out of memory: 288230376151711744 bytes for moments on top of weights 3 MiB, gradients 0 MiB, moments 0 "
            "MiB, activations 0 MiB, communication 0 MiB, workspace 0 MiB, staging 0 MiB; use a smaller batch or "
            "model, or more ranks");
  EXPECT_EQ(at(allocator.report().in_use, Purpose::moments), 0U);
  const Tensor after = bytes(allocator, 4000);  // and it goes on working
  EXPECT_TRUE(static_cast<bool>(after));
}

}  // namespace
}  // namespace tforge
