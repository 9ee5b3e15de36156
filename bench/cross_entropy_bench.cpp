// The two passes of cross entropy over a matrix of logits.
#include "kernels/cross_entropy.h"

#include <benchmark/benchmark.h>

#include "kernels/gemm.h"

namespace tforge {
namespace {

struct Operands {
  Allocator allocator;
  std::int64_t rows, vocab;
  Tensor logits, targets, max, sum, target, nll;
  Stream stream;

  explicit Operands(const benchmark::State& state) : rows(state.range(0)), vocab(state.range(1)) {
    kernels::start_cpu_runtime(static_cast<int>(state.range(2)));
    const auto make = [&](std::int64_t columns, DType dtype) {
      return Tensor::zeros(allocator, {rows, columns}, dtype, Purpose::activations);
    };
    logits = make(vocab, DType::f32);
    targets = make(1, DType::i32);
    max = make(1, DType::f32);
    sum = make(1, DType::f32);
    target = make(1, DType::f32);
    nll = make(1, DType::f64);
    float x = 0.1F;
    for (float& value : logits.span<float>()) value = x = 3.7F * x * (1 - x);  // chaotic in (0, 1)
  }
  void forward() {
    kernels::cross_entropy_row_statistics(stream, logits.view(), targets.view(), 0, max.view(), sum.view(),
                                          target.view());
    kernels::cross_entropy_nll(stream, max.view(), sum.view(), target.view(), targets.view(), nll.view());
  }
  void rate(benchmark::State& state) const {
    state.counters["logits/s"] =
        benchmark::Counter(static_cast<double>(rows * vocab), benchmark::Counter::kIsIterationInvariantRate);
  }
};

void forward(benchmark::State& state) {
  Operands x(state);
  for (auto _ : state) x.forward();
  x.rate(state);
}

/// In place: from the second iteration on the logits are small gradients, which cost the same.
void backward(benchmark::State& state) {
  Operands x(state);
  x.forward();
  for (auto _ : state) {
    kernels::cross_entropy_backward(x.stream, x.max.view(), x.sum.view(), x.targets.view(), 0, 1e-3, x.logits.view(),
                                    x.logits.view());
  }
  x.rate(state);
}

void sizes(benchmark::internal::Benchmark* b) {
  b->ArgNames({"rows", "vocab", "threads"})->UseRealTime()->Unit(benchmark::kMillisecond);
  for (const std::int64_t threads : {1, 2}) b->Args({512, 50304, threads})->Args({2048, 4096, threads});
}
BENCHMARK(forward)->Name("CrossEntropyForward")->Apply(sizes);
BENCHMARK(backward)->Name("CrossEntropyBackward")->Apply(sizes);

}  // namespace
}  // namespace tforge

BENCHMARK_MAIN();
