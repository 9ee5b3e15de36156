#pragma once
// The profile of a step as a table, each kernel against its own floor: its products at the rate of a large product, or
// its bytes at the rate of a large sum, whichever takes longer; both rates are measured in the same process.
#include <algorithm>
#include <chrono>
#include <cstdio>
#include <utility>
#include <vector>

#include "core/device_queue.h"
#include "core/profile.h"
#include "kernels/elementwise.h"
#include "kernels/gemm.h"
#include "kernels/random.h"

namespace tforge::bench {

/// Median seconds of a call.
template <class F>
double median_seconds(int repeats, const F& f) {
  std::vector<double> seconds;
  for (int i = 0; i < repeats; ++i) {
    const auto begun = std::chrono::steady_clock::now();
    f();
    seconds.push_back(std::chrono::duration<double>(std::chrono::steady_clock::now() - begun).count());
  }
  std::ranges::nth_element(seconds, seconds.begin() + repeats / 2);
  return seconds[static_cast<std::size_t>(repeats / 2)];
}

struct Ceilings {
  double flops_per_second = 0;
  double bytes_per_second = 0;
};

/// Of products of `dtype`, f32 on the CPU, and of sums of f32.
inline Ceilings measure_ceilings(Stream& stream, Allocator& allocator, DType dtype = DType::f32) {
  const bool on_device = stream.device() != Device::cpu;  // where more is needed to keep all of it at work
  const std::int64_t side = on_device ? 8192 : 1536, elements = std::int64_t{1} << (on_device ? 28 : 25);
  Tensor from = Tensor::zeros(allocator, Shape{elements}, DType::f32, Purpose::activations);
  Tensor to = Tensor::zeros(allocator, Shape{elements}, DType::f32, Purpose::activations);
  // Random numbers: with zeros a device draws less power, and keeps a clock that no training has.
  const auto random = [&](std::uint64_t seed) {
    Allocator host;
    Stream cpu;
    Tensor numbers = Tensor::empty(host, Shape{side, side}, DType::f32, Purpose::activations);
    kernels::fill_normal(cpu, seed, "ceiling", 0, 1, GradMode::overwrite, numbers.view());
    Tensor there = numbers.clone(allocator);
    if (dtype != DType::bf16) return there;
    Tensor narrow = Tensor::empty(allocator, Shape{side, side}, dtype, Purpose::activations);
    kernels::convert(stream, std::as_const(there).view(), narrow.view());
    return narrow;
  };
  const Tensor a = random(1), b = random(2);
  Tensor c = Tensor::empty(allocator, Shape{side, side}, a.dtype(), Purpose::activations);
  const double product = median_seconds(7, [&] {
    kernels::gemm(stream, kernels::Transpose::no, kernels::Transpose::no, 1, a.view(), b.view(), GradMode::overwrite,
                  c.view());
    wait(stream);
  });
  const double sum = median_seconds(7, [&] {
    kernels::add_to(stream, std::as_const(from).view(), GradMode::accumulate, to.view());
    wait(stream);
  });
  const auto edge = static_cast<double>(side);
  return {2.0 * edge * edge * edge / product, 3.0 * static_cast<double>(elements) * sizeof(float) / sum};
}

/// `seconds` of wall time of the profiled step.
inline void print_profile(std::FILE* file, const Profile& profile, double seconds, const Ceilings& ceilings) {
  std::vector<Profile::Entry> entries = profile.entries();
  std::ranges::sort(entries, std::ranges::greater{}, &Profile::Entry::seconds);
  std::fprintf(file, "ceilings: product %.0f GFLOP/s, memory %.1f GB/s; step %.1f ms\n",
               ceilings.flops_per_second / 1e9, ceilings.bytes_per_second / 1e9, seconds * 1e3);
  std::fprintf(file, "%-26s %6s %9s %6s %8s %8s %9s %9s %6s\n", "kernel", "calls", "ms", "share", "GFLOP", "GB",
               "GFLOP/s", "floor ms", "floor");
  double known = 0, flops = 0, all_floors = 0;
  for (const Profile::Entry& e : entries) {
    const double floor = std::max(e.work.flops / ceilings.flops_per_second, e.work.bytes / ceilings.bytes_per_second);
    std::fprintf(file, "%-26.*s %6lld %9.2f %5.1f%% %8.2f %8.3f %9.1f %9.2f %5.0f%%\n", static_cast<int>(e.name.size()),
                 e.name.data(), static_cast<long long>(e.calls), e.seconds * 1e3, 100 * e.seconds / seconds,
                 e.work.flops / 1e9, e.work.bytes / 1e9, e.work.flops / e.seconds / 1e9, floor * 1e3,
                 100 * floor / e.seconds);
    known += e.seconds;
    flops += e.work.flops;
    all_floors += floor;
  }
  std::fprintf(file, "%-26s %6s %9.2f %5.1f%%\n", "between kernels", "", (seconds - known) * 1e3,
               100 * (seconds - known) / seconds);
  std::fprintf(file, "%-26s %6s %9.2f %5s%% %8.2f %8s %9.1f %9.2f %5.0f%%\n", "step", "", seconds * 1e3, "100",
               flops / 1e9, "", flops / seconds / 1e9, all_floors * 1e3, 100 * all_floors / seconds);
}

}  // namespace tforge::bench
