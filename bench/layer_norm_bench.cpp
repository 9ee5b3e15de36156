// LayerNorm with parameters.
#include "kernels/layer_norm.h"

#include <benchmark/benchmark.h>

#include "kernels/gemm.h"

namespace tforge {
namespace {

struct Operands {
  Allocator allocator;
  std::int64_t rows, d;
  Tensor x, y, dy, weight, bias, dweight, dbias, mean, rstd;
  Stream stream;

  explicit Operands(const benchmark::State& state) : rows(state.range(0)), d(state.range(1)) {
    kernels::start_cpu_runtime(static_cast<int>(state.range(2)));
    const auto make = [&](std::int64_t r, std::int64_t c) {
      Tensor t = Tensor::empty(allocator, {r, c}, DType::f32, Purpose::activations);
      float v = 0.1F;
      for (float& value : t.span<float>()) value = v = 3.7F * v * (1 - v);  // chaotic in (0, 1)
      return t;
    };
    x = make(rows, d), y = make(rows, d), dy = make(rows, d);
    weight = make(1, d), bias = make(1, d), dweight = make(1, d), dbias = make(1, d);
    mean = make(rows, 1), rstd = make(rows, 1);
  }
  void forward() {
    kernels::layer_norm_forward(stream, x.view(), weight.view(), bias.view(), 1e-5, y.view(), mean.view(), rstd.view());
  }
  void rate(benchmark::State& state) const {
    state.counters["elements/s"] =
        benchmark::Counter(static_cast<double>(rows * d), benchmark::Counter::kIsIterationInvariantRate);
  }
};

void forward(benchmark::State& state) {
  Operands o(state);
  for (auto _ : state) o.forward();
  o.rate(state);
}

void backward(benchmark::State& state) {
  Operands o(state);
  o.forward();
  for (auto _ : state) {
    kernels::layer_norm_backward(o.stream, o.x.view(), o.weight.view(), o.mean.view(), o.rstd.view(), o.dy.view(),
                                 GradMode::overwrite, o.y.view(), GradMode::overwrite, o.dweight.view(),
                                 o.dbias.view());
  }
  o.rate(state);
}

void sizes(benchmark::internal::Benchmark* b) {
  b->ArgNames({"rows", "d", "threads"})->UseRealTime()->Unit(benchmark::kMicrosecond);
  for (const std::int64_t threads : {1, 2})
    b->Args({4096, 128, threads})->Args({2048, 256, threads})->Args({512, 768, threads});
}
BENCHMARK(forward)->Name("LayerNormForward")->Apply(sizes);
BENCHMARK(backward)->Name("LayerNormBackward")->Apply(sizes);

}  // namespace
}  // namespace tforge

BENCHMARK_MAIN();
