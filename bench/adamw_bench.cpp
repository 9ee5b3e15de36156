// AdamW and the norm of the gradients. Both are bound by memory: 28 bytes a parameter (p, g, m, v read; p, m, v
// written) and 4.
#include "kernels/adamw.h"

#include <benchmark/benchmark.h>

#include "kernels/gemm.h"

namespace tforge {
namespace {

Tensor filled(Allocator& allocator, std::int64_t count, double value) {
  Tensor t = Tensor::empty(allocator, {1, count}, DType::f32, Purpose::weights);
  for (float& x : t.span<float>()) x = static_cast<float>(value);
  return t;
}

void rate(benchmark::State& state, double bytes) {
  const auto count = static_cast<double>(state.range(0));
  state.counters["params/s"] = benchmark::Counter(count, benchmark::Counter::kIsIterationInvariantRate);
  state.counters["B/s"] = benchmark::Counter(bytes * count, benchmark::Counter::kIsIterationInvariantRate);
}

void update(benchmark::State& state) {
  kernels::start_cpu_runtime(static_cast<int>(state.range(1)));
  Allocator allocator;
  Tensor p = filled(allocator, state.range(0), 1), g = filled(allocator, state.range(0), 1e-3);
  Tensor m = filled(allocator, state.range(0), 0), v = filled(allocator, state.range(0), 0);
  Stream stream;
  const kernels::AdamWStep step{.lr = 3e-4, .weight_decay = 0.1};
  for (auto _ : state) kernels::adamw_update(stream, step, p.view(), g.view(), m.view(), v.view());
  rate(state, 28);
}

void norm(benchmark::State& state) {
  kernels::start_cpu_runtime(static_cast<int>(state.range(1)));
  Allocator allocator;
  const Tensor g = filled(allocator, state.range(0), 1e-3);
  Stream stream;
  Tensor sum = Tensor::zeros(allocator, Shape{1}, DType::f64, Purpose::activations);
  for (auto _ : state) kernels::sum_of_squares(stream, g.view(), sum.view(), {});
  rate(state, 4);
}

void sizes(benchmark::internal::Benchmark* b) {
  b->ArgNames({"params", "threads"})->UseRealTime();
  for (const std::int64_t threads : {1, 2}) {
    for (const std::int64_t params : {400'000, 20'000'000}) b->Args({params, threads});
  }
}
BENCHMARK(update)->Name("AdamW")->Apply(sizes);
BENCHMARK(norm)->Name("SumOfSquares")->Apply(sizes);

}  // namespace
}  // namespace tforge

BENCHMARK_MAIN();
