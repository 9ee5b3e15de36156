#pragma once
// The profile of a step as a table, each kernel against its own floor: its products at the rate of a large sgemm, or
// its bytes at the rate of a large copy, whichever takes longer; both rates are measured in the same process.
#include <algorithm>
#include <chrono>
#include <cstdio>
#include <utility>
#include <vector>

#include "core/profile.h"
#include "kernels/elementwise.h"
#include "kernels/gemm.h"

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

inline Ceilings measure_ceilings(Allocator& allocator) {
  Stream stream;
  constexpr std::int64_t kSide = 1536, kLong = std::int64_t{1} << 25;
  const auto zeros = [&](const Shape& shape) {
    return Tensor::zeros(allocator, shape, DType::f32, Purpose::activations);
  };
  Tensor a = zeros({kSide, kSide}), b = zeros({kSide, kSide}), c = zeros({kSide, kSide});
  Tensor from = zeros({kLong}), to = zeros({kLong});
  const double product = median_seconds(7, [&] {
    kernels::gemm(stream, kernels::Transpose::no, kernels::Transpose::no, 1, a.view(), b.view(), GradMode::overwrite,
                  c.view());
  });
  const double copy = median_seconds(7, [&] { kernels::add_to(stream, from.view(), GradMode::accumulate, to.view()); });
  return {2.0 * kSide * kSide * kSide / product, 3.0 * kLong * sizeof(float) / copy};
}

/// `seconds` of wall time of the profiled step.
inline void print_profile(std::FILE* file, const Profile& profile, double seconds, const Ceilings& ceilings) {
  std::vector<Profile::Entry> entries = profile.entries();
  std::ranges::sort(entries, std::ranges::greater{}, &Profile::Entry::seconds);
  std::fprintf(file, "ceilings: sgemm %.0f GFLOP/s, memory %.1f GB/s; step %.1f ms\n", ceilings.flops_per_second / 1e9,
               ceilings.bytes_per_second / 1e9, seconds * 1e3);
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
