// Pattention against the matrix products inside it: forward and backward of one layer, and the two (four) bare
// products by OpenBLAS on the same sizes ("floor"), on all threads. Saved scores rotate over more memory than the
// caches hold, as in a training step, where backward finds them in memory.
#include <benchmark/benchmark.h>
#include <omp.h>

#include <array>
#include <cmath>
#include <cstdint>
#include <vector>

#include "core/rng.h"
#include "kernels/gemm.h"
#include "kernels/pattention.h"

namespace {

using namespace tforge;
using kernels::Transpose;

struct Layer {
  std::int64_t rows, d, n;
  Allocator allocator;
  Stream stream;
  Tensor x, keys, values, u, du, dx, dkeys, dvalues, stat, weight, dweight, workspace;
  std::vector<Tensor> scores;
  PattentionNorm norm;
  double scale;

  Layer(const benchmark::State& state, PattentionNorm norm_)
      : rows(state.range(0)), d(state.range(1)), n(state.range(2)), norm(norm_), scale(initial_scale(norm_, n)) {
    kernels::start_cpu_runtime(0);
    x = random(rows, d, 1);
    keys = random(n, d, 0.02);
    values = random(n, d, 0.02);
    du = random(rows, d, 1);
    u = empty(rows, d), dx = empty(rows, d), dkeys = empty(n, d), dvalues = empty(n, d);
    if (norm != PattentionNorm::gelu_l2_norm) stat = empty(rows, 1);
    if (norm != PattentionNorm::l2_norm_gelu) weight = random(rows, 1, 1), dweight = random(rows, 1, 1);
    const std::int64_t copies = 1 + (std::int64_t{96} << 20) / (rows * n * 4);
    for (std::int64_t i = 0; i < copies; ++i) scores.push_back(random(rows, n, 1));
    workspace = empty(1, std::max(kernels::pattention_forward_workspace(rows, n, d, d),
                                  kernels::pattention_backward_workspace(rows, n, d, d)));
  }
  Tensor empty(std::int64_t r, std::int64_t c) {
    return Tensor::empty(allocator, Shape{r, c}, DType::f32, Purpose::activations);
  }
  Tensor random(std::int64_t r, std::int64_t c, double deviation) {
    Tensor t = empty(r, c);
    static const std::vector<double> numbers = [] {
      std::vector<double> v(4099);  // a prime, so that rows differ
      const Rng rng(1, "bench");
      for (std::size_t i = 0; i < v.size(); ++i) v[i] = rng.normal(i);
      return v;
    }();
    std::size_t i = 0;
    for (float& value : t.span<float>()) value = static_cast<float>(deviation * numbers[i++ % numbers.size()]);
    return t;
  }
  static TensorView view(Tensor& t) { return t ? t.view() : TensorView{}; }

  void forward(std::size_t i) {
    const std::array group{kernels::PattentionForward{
        scale, keys.view(), values.view(), scores[i % scores.size()].view(), view(stat), u.view(), view(weight)}};
    kernels::pattention_forward(stream, norm, x.view(), group, {}, workspace.view());
  }
  void backward(std::size_t i) {
    const std::array group{kernels::PattentionBackward{scale, scores[i % scores.size()].view(), view(stat), keys.view(),
                                                       values.view(), du.view(), view(dweight), GradMode::overwrite,
                                                       dkeys.view(), GradMode::overwrite, dvalues.view()}};
    kernels::pattention_backward(stream, norm, x.view(), group, GradMode::overwrite, dx.view(), workspace.view());
  }
  void product(Transpose a_op, Transpose b_op, Tensor& a, Tensor& b, Tensor& c) {
    kernels::gemm(stream, a_op, b_op, 1, a.view(), b.view(), GradMode::overwrite, c.view());
  }
  void forward_floor(std::size_t i) {
    Tensor& a = scores[i % scores.size()];
    product(Transpose::no, Transpose::yes, x, keys, a);
    product(Transpose::no, Transpose::no, a, values, u);
  }
  void backward_floor(std::size_t i) {
    Tensor& a = scores[i % scores.size()];
    product(Transpose::no, Transpose::yes, du, values, a);
    product(Transpose::yes, Transpose::no, a, du, dvalues);
    product(Transpose::no, Transpose::no, a, keys, dx);
    product(Transpose::yes, Transpose::no, a, x, dkeys);
  }
};

void run(benchmark::State& state, PattentionNorm norm, void (Layer::*step)(std::size_t), int products) {
  Layer layer(state, norm);
  for (std::size_t i = 0; i < layer.scores.size(); ++i) layer.forward(i);
  std::size_t i = 0;
  for (auto _ : state) (layer.*step)(i++);
  state.counters["GFLOP/s"] =
      benchmark::Counter(2e-9 * products * static_cast<double>(layer.rows * layer.d * layer.n * state.iterations()),
                         benchmark::Counter::kIsRate);
}

void sizes(benchmark::internal::Benchmark* b) {
  b->Unit(benchmark::kMillisecond)->UseRealTime();
  b->Args({4096, 128, 128})->Args({4096, 128, 512})->Args({2048, 256, 256})->Args({2048, 256, 1024});
  b->Args({512, 768, 768})->Args({512, 768, 3072})->Args({1, 768, 3072})->Args({8, 768, 3072});
}

constexpr auto kDefault = PattentionNorm::l2_norm_gelu;
BENCHMARK_CAPTURE(run, floor_forward, kDefault, &Layer::forward_floor, 2)->Apply(sizes);
BENCHMARK_CAPTURE(run, forward, kDefault, &Layer::forward, 2)->Apply(sizes);
BENCHMARK_CAPTURE(run, floor_backward, kDefault, &Layer::backward_floor, 4)->Apply(sizes);
BENCHMARK_CAPTURE(run, backward, kDefault, &Layer::backward, 4)->Apply(sizes);
BENCHMARK_CAPTURE(run, gelu_l2_norm_forward, PattentionNorm::gelu_l2_norm, &Layer::forward, 2)->Apply(sizes);
BENCHMARK_CAPTURE(run, gelu_l2_norm_backward, PattentionNorm::gelu_l2_norm, &Layer::backward, 4)->Apply(sizes);
BENCHMARK_CAPTURE(run, softmax_forward, PattentionNorm::softmax, &Layer::forward, 2)->Apply(sizes);
BENCHMARK_CAPTURE(run, softmax_backward, PattentionNorm::softmax, &Layer::backward, 4)->Apply(sizes);

}  // namespace

BENCHMARK_MAIN();
