// The Memory Layer (hash_bits 8) against the dense layer that it replaces: one token, as in generation, where both read
// memory, and many rows, forward and back. Layers rotate, as in a model, over more memory than the caches hold.
//   "Dense" is kernels/gemm.h; "DenseDots" reads the weights once where they lie, as Pattention does for few rows.
#include <benchmark/benchmark.h>

#include <cstdint>
#include <vector>

#include "core/rng.h"
#include "kernels/cpu/parallel.h"
#include "kernels/cpu/row_passes.h"
#include "kernels/gemm.h"
#include "kernels/memory_layer.h"

namespace {

using namespace tforge;

constexpr std::int64_t kBits = 8;

struct Layers {
  std::int64_t rows, d, tables;
  Allocator allocator;
  Stream stream;
  Tensor x, y, dy, dx, codes, hash_weights, dweights, coordinates, order, dtables;
  std::vector<Tensor> layers;  // tables, or weights of the dense layer
  std::size_t next = 0;

  Layers(const benchmark::State& state, std::int64_t rows_of_layer, std::size_t count)
      : rows(state.range(0)), d(state.range(1)), tables(d / kBits) {
    kernels::start_cpu_runtime(static_cast<int>(state.range(2)));
    x = random(rows, d), dy = random(rows, d), y = random(rows, d), dx = random(rows, d);
    codes = Tensor::empty(allocator, Shape{rows, tables}, DType::i32, Purpose::activations);
    hash_weights = random(rows, tables), dweights = random(tables, rows);
    coordinates = Tensor::empty(allocator, Shape{kBits, tables}, DType::i32, Purpose::weights);
    const auto at = coordinates.span<std::int32_t>();
    for (std::int64_t i = 0; i < kBits * tables; ++i) {
      at[static_cast<std::size_t>(i)] = static_cast<std::int32_t>(i % tables * kBits + i / tables);
    }
    order = Tensor::empty(allocator, Shape{kernels::memory_lookup_workspace(rows, kBits, tables)}, DType::i32,
                          Purpose::workspace);
    for (std::size_t i = 0; i < count; ++i) layers.push_back(random(rows_of_layer, d));
  }
  Tensor random(std::int64_t r, std::int64_t c) {
    static const std::vector<float> numbers = [] {
      std::vector<float> v(4099);  // a prime, so that rows differ
      const Rng rng(1, "bench");
      for (std::size_t i = 0; i < v.size(); ++i) v[i] = static_cast<float>(rng.normal(i));
      return v;
    }();
    Tensor t = Tensor::empty(allocator, Shape{r, c}, DType::f32, Purpose::activations);
    std::size_t i = 0;
    for (float& value : t.span<float>()) value = numbers[i++ % numbers.size()];
    return t;
  }
  Tensor& layer() { return layers[next++ % layers.size()]; }
  static ConstTensorView view(const Tensor& t) { return t.view(); }
  kernels::MemoryHash hash() const { return {HashWeight::p, 1.0, kBits, view(coordinates)}; }

  void forward() {
    kernels::memory_hash_forward(stream, hash(), x.view(), codes.view(), hash_weights.view());
    const kernels::MemoryForward f{view(layer()), y.view()};
    kernels::memory_lookup_forward(stream, kBits, view(codes), view(hash_weights), {&f, 1});
  }
  void backward() {
    const kernels::MemoryBackward b{view(layer()), view(dy), GradMode::overwrite, dtables.view()};
    kernels::memory_lookup_backward(stream, kBits, view(codes), view(hash_weights), {&b, 1}, dweights.view(),
                                    order.view());
    kernels::memory_hash_backward(stream, hash(), x.view(), view(dweights), GradMode::overwrite, dx.view());
  }
};

/// So many that all together are about 400 MB.
std::size_t copies(std::int64_t elements) { return static_cast<std::size_t>(1 + 100'000'000 / elements); }

void memory(benchmark::State& state) {
  const std::int64_t d = state.range(1), rows = d / kBits << kBits;
  Layers l(state, rows, copies(rows * d));
  std::size_t i = 0;
  for (auto _ : state) {
    l.x.span<float>()[i++ % static_cast<std::size_t>(d)] *= -1;  // other rows of a table now and then
    l.forward();
  }
}

void memory_backward(benchmark::State& state) {
  const std::int64_t d = state.range(1), rows = d / kBits << kBits;
  Layers l(state, rows, 2);
  l.dtables = l.random(rows, d);
  l.forward();
  for (auto _ : state) l.backward();
}

void dense(benchmark::State& state) {
  const std::int64_t d = state.range(1);
  Layers l(state, d, copies(d * d));
  for (auto _ : state) {
    kernels::gemm(l.stream, kernels::Transpose::no, kernels::Transpose::yes, 1, Layers::view(l.x),
                  Layers::view(l.layer()), GradMode::overwrite, l.y.view());
  }
}

void dense_dots(benchmark::State& state) {
  const std::int64_t d = state.range(1);
  Layers l(state, d, copies(d * d));
  const auto& passes = kernels::cpu::row_passes<float>();
  for (auto _ : state) {
    const float* const weights = Layers::view(l.layer()).as<float>();
    constexpr std::int64_t kColumns = 128;
    kernels::cpu::parallel_blocks(d / kColumns, [&](std::int64_t b) {
      passes.dots(l.rows, Layers::view(l.x).as<float>(), d, kColumns, weights + b * kColumns * d, d, d,
                  l.y.view().as<float>() + b * kColumns, d);
    });
  }
}

void dense_backward(benchmark::State& state) {
  const std::int64_t d = state.range(1);
  Layers l(state, d, 2);
  l.dtables = l.random(d, d);
  for (auto _ : state) {
    kernels::gemm(l.stream, kernels::Transpose::no, kernels::Transpose::no, 1, Layers::view(l.dy),
                  Layers::view(l.layer()), GradMode::overwrite, l.dx.view());
    kernels::gemm(l.stream, kernels::Transpose::yes, kernels::Transpose::no, 1, Layers::view(l.dy), Layers::view(l.x),
                  GradMode::overwrite, l.dtables.view());
  }
}

void one_token(benchmark::internal::Benchmark* b) {
  b->ArgNames({"rows", "d", "threads"})->UseRealTime()->MeasureProcessCPUTime()->Unit(benchmark::kMicrosecond);
  for (const std::int64_t threads : {1, 2}) b->Args({1, 512, threads})->Args({1, 1024, threads});
}
void many_rows(benchmark::internal::Benchmark* b) {
  b->ArgNames({"rows", "d", "threads"})->UseRealTime()->MeasureProcessCPUTime()->Unit(benchmark::kMicrosecond);
  for (const std::int64_t threads : {1, 2}) b->Args({2048, 512, threads});
}
BENCHMARK(memory)->Name("MemoryToken")->Apply(one_token);
BENCHMARK(dense)->Name("DenseToken")->Apply(one_token);
BENCHMARK(dense_dots)->Name("DenseDotsToken")->Apply(one_token);
BENCHMARK(memory)->Name("MemoryRows")->Apply(many_rows);
BENCHMARK(dense)->Name("DenseRows")->Apply(many_rows);
BENCHMARK(memory_backward)->Name("MemoryRowsBackward")->Apply(many_rows);
BENCHMARK(dense_backward)->Name("DenseRowsBackward")->Apply(many_rows);

}  // namespace

BENCHMARK_MAIN();
